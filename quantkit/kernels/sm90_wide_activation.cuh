// Activations to the bfloat16 B operand of sm90_gemm.cuh in one pass over a token: RMSNorm or SwiGLU
// before it where the model has that, outlier channels gathered for the branch and zeroed, block
// Hadamard, NVFP4 or MXFP8 as quantkit.formats has it, each value times its block scale, written as
// the swizzled tile that a bulk copy brings in.
//
// No number here depends on the rest of the token but RMSNorm's and an FP8 branch's scale. So CTAs
// share a token without a word to one another, and the branch has a CTA of its own; with RMSNorm
// one CTA has the whole token.
#pragma once

#include "sm90_activation_parts.cuh"

namespace quantkit::sm90 {

enum class Format { kNvfp4, kMxfp8 };

// Mirrored by sm90_wide_activation.py (WideActivationArguments).
struct WideActivationArguments {
  void const* x;             // [m, k], 16 bits an element; gated: [m, 2 k], gate before up
  void const* gain;          // [k], as x: x is normalised first; null: it is not
  uint16_t const* keep;      // [k]: 0 where an outlier channel leaves the main path; null: none
  int const* outlier_index;  // [branch_columns]: channel, or -1
  float const* divisor;      // NVFP4: of the tensor
  uint8_t* tokens;           // [token tile][brick], branch bricks after the main ones
  float2* token_scales;      // scale, branch scale / scale
  int64_t token_tile_bytes;
  int m, k, tile, bricks, branch_columns, branch_fp8;
  int carry;     // MXFP8: added to the bits of a block's largest magnitude, the scale rule
  int hadamard;  // channels mixed at a time: 0, or a power of two in 32..512
  int gated;     // silu(gate) * up is what is quantized
  float epsilon;  // added to the mean square
};

constexpr int kBrickUnits = 4;  // 64 columns
constexpr int kMostThreads = 512;

// To `Mantissa` bits, ties to even, in steps no finer than those above `smallest`; NaN stays NaN.
template <int Mantissa>
CUTLASS_DEVICE float rounded(float v, float smallest) {
  // The sum with 1.5 x 2^23 steps has its last bit at one step.
  uint32_t const leading = max(__float_as_int(v) & 0x7F800000, __float_as_int(smallest));
  float const magic = __uint_as_float(leading + ((23 - Mantissa) << 23 | 0x400000));
  return (v + magic) - magic;
}

// A block of 16 as E2M1 multiples of its E4M3 scale, whose quotient with `divisor` is the step.
CUTLASS_DEVICE void round_nvfp4(float (&f)[kUnit], float divisor) {
  int largest = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) largest = max(largest, absolute_bits(f[i]));
  float const wanted = __fmul_rn(divisor, __fdiv_rn(__int_as_float(largest), 6.f));
  float scale = rounded<3>(wanted > 448.f ? 448.f : wanted, 0x1p-6f);
  if (scale == 0.f && largest) scale = 0x1p-9f;
  if (largest >= 0x7F800000) scale = __int_as_float(0x7FC00000);
  float const step = scale == 0.f ? 1.f : __fdiv_rn(scale, divisor);
  auto finish = [&](float v, float quotient) {
    float const nearest = rounded<1>(quotient > 6.f ? 6.f : quotient, 1.f);
    return __int_as_float(__float_as_int(nearest) | (__float_as_int(v) & 0x80000000)) * scale;
  };
  if (step > 0x1p-90f && step < 0x1p90f) {
    // IEEE's quotient by two corrections of an estimate, where nothing that counts underflows.
    float const inverse = __frcp_rn(step);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      float const v = fabsf(f[i]);
      float quotient = v * inverse;
#pragma unroll
      for (int n = 0; n < 2; ++n)
        quotient = __fmaf_rn(__fmaf_rn(-quotient, step, v), inverse, quotient);
      f[i] = finish(f[i], fminf(quotient, 6.f));  // 6 of an overflow's NaN, too
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) f[i] = finish(f[i], __fdiv_rn(fabsf(f[i]), step));
  }
}

// Half a block of 32, the other with the thread's neighbour, as E4M3 multiples of a power of two.
CUTLASS_DEVICE void round_mxfp8(float (&f)[kUnit], int carry) {
  int const largest = block_maximum(f);
  int const exponent = min(max(((min(largest, 0x7F7FFFFF) + carry) >> 23) - 8, 0), 246);
  float scale = exponent ? power_of_two(exponent) : 0x1p-127f;
  if (largest >= 0x7F800000) scale = __int_as_float(0x7FC00000);
  float const inverse = power_of_two(254 - exponent);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    float const v = fminf(fmaxf(f[i] * inverse, -448.f), 448.f);
    f[i] = rounded<3>(v, 0x1p-6f) * scale;
  }
}

CUTLASS_DEVICE uint4 to_bf16x8(float const* f) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(f[2 * i], f[2 * i + 1]);
    words[i] = reinterpret_cast<uint32_t const&>(pair);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Biased exponent of the E4M3 branch's scale (even rule), from its largest magnitude's bits.
CUTLASS_DEVICE int branch_scale(int largest) {
  if (largest >= 0x7F800000) return 253;
  return min(max(((largest + (1 << 19)) >> 23) - 8, 1), 246);
}

// Grid: the CTAs of a token, then those of the next. `Units` a thread.
template <class Input, Format kFormat, int Units, bool Hadamard, Source kSource>
__global__ void __launch_bounds__(kMostThreads, Units == 4 ? 1 : 2)
    quantize_wide_tokens(__grid_constant__ WideActivationArguments const args) {
  constexpr bool kGated = kSource == Source::kGated, kNormed = kSource == Source::kNormed;
  static_assert(kNormed || Units == 1);
  cutlass::arch::launch_dependent_grids();
  int const threads = blockDim.x, thread = threadIdx.x, lane = thread % 32;
  int const parts = gridDim.x / args.m, token = blockIdx.x / parts, part = blockIdx.x % parts;
  int const units = args.k / kUnit;
  bool const has_branch = part == parts - 1;
  bool const has_main = part * threads < args.bricks * kBrickUnits;
  auto unit_of = [&](int v) { return (part + v) * threads + thread; };
  if (args.m <= kFew) {  // constants of the site, while the kernel before ends
    for (int v = 0; has_main && v < Units; ++v) {
      int const at = unit_of(v) * kUnit;
      if (at >= args.k) continue;
      if (args.keep) prefetch(args.keep + at);
      if constexpr (kNormed) prefetch(static_cast<Input const*>(args.gain) + at);
    }
    if (has_branch && thread * 8 < args.branch_columns) prefetch(args.outlier_index + thread * 8);
  }
  float const divisor = kFormat == Format::kNvfp4 ? __ldg(args.divisor) : 1.f;
  cutlass::arch::wait_on_dependent_grids();
  size_t const stride = kGated ? 2 * args.k : args.k;
  Input const* const row = static_cast<Input const*>(args.x) + token * stride;
  Input const* const gain = static_cast<Input const*>(args.gain);
  int const tile = token / args.tile, r = token % args.tile;
  uint8_t* const out = args.tokens + tile * args.token_tile_bytes;

  uint4 raw[Units][2];
  float inverse_rms = 0.f;
  if (has_main) {
#pragma unroll
    for (int v = 0; v < Units; ++v) {
      int const unit = unit_of(v);
      raw[v][0] = raw[v][1] = make_uint4(0, 0, 0, 0);
      if (unit >= units) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        raw[v][h] = reinterpret_cast<uint4 const*>(row)[unit * 2 + h];
        if constexpr (kGated) {
          uint4 const up = reinterpret_cast<uint4 const*>(row + args.k)[unit * 2 + h];
          raw[v][h] = gated_product<Input>(raw[v][h], up);
        }
      }
    }
  }
  if constexpr (kNormed) {
    __shared__ float warp_square[16], unused;
    float square = 0.f;
#pragma unroll
    for (int v = 0; v < Units; ++v)
      square += sum_of_squares<Input>(raw[v][0]) + sum_of_squares<Input>(raw[v][1]);
    square = token_sum(square, 1, warp_square, unused);
    inverse_rms = rsqrtf(square / float(args.k) + args.epsilon);
  }
  auto outlier = [&](int j) {
    int const channel = __ldg(args.outlier_index + j);
    if (channel < 0) return 0.f;
    if constexpr (kGated) return to_float(gated_product(row[channel], row[args.k + channel]));
    if constexpr (kNormed) return to_float(normalized(row[channel], gain[channel], inverse_rms));
    return to_float(row[channel]);
  };
  int largest = 0;  // magnitude of the outlier channels, as bits
  if (has_branch && args.branch_fp8) {
    for (int j = thread; j < args.branch_columns; j += threads)
      largest = max(largest, absolute_bits(outlier(j)));
  }
  if (has_main) {
#pragma unroll
    for (int v = 0; v < Units; ++v) {
      int const unit = unit_of(v), brick = unit / kBrickUnits, chunk = unit % kBrickUnits * 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (unit >= units) continue;
        if constexpr (kNormed) {
          uint4 const g = __ldg(reinterpret_cast<uint4 const*>(gain) + unit * 2 + h);
          raw[v][h] = normalized<Input>(raw[v][h], g, inverse_rms);
        }
        if (args.keep) {
          uint4 const mask = __ldg(reinterpret_cast<uint4 const*>(args.keep) + unit * 2 + h);
          raw[v][h].x &= mask.x, raw[v][h].y &= mask.y;
          raw[v][h].z &= mask.z, raw[v][h].w &= mask.w;
        }
      }
      float f[kUnit];
      unpack<Input, Hadamard>(raw[v], f, args.hadamard);
      if constexpr (kFormat == Format::kNvfp4)
        round_nvfp4(f, divisor);
      else
        round_mxfp8(f, args.carry);
      uint8_t* const at = out + (size_t(brick) * args.tile + r) * 128;
      if (brick < args.bricks) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
          *reinterpret_cast<uint4*>(at + ((chunk + h ^ r % 8) << 4)) = to_bf16x8(f + 8 * h);
      }
    }
  }
  if (!has_branch) return;

  int exponent = 127;
  if (args.branch_fp8) {
    __shared__ int warp_branch[16];
    largest = __reduce_max_sync(~0u, largest);
    if (lane == 0) warp_branch[thread / 32] = largest;
    __syncthreads();
    exponent = branch_scale(__reduce_max_sync(~0u, warp_branch[min(lane, threads / 32 - 1)]));
  }
  if (thread == 0) {
    float const scale = __fdiv_rn(1.f, divisor);
    float const own = args.branch_columns ? __fdiv_rn(power_of_two(exponent), scale) : 1.f;
    args.token_scales[token] = make_float2(scale, own);
  }
  uint8_t* const side = out + size_t(args.bricks) * args.tile * 128;
  for (int j = thread; j < args.branch_columns; j += threads) {
    int const byte = args.branch_fp8 ? j : 2 * j;
    uint8_t* const at = side + (size_t(byte / 64) * args.tile + r) * 64 +
                        ((byte % 64 / 16 ^ r / 2 % 4) << 4) + byte % 16;
    if (args.branch_fp8)
      *at = to_e4m3(outlier(j) * power_of_two(254 - exponent));
    else
      *reinterpret_cast<__nv_bfloat16*>(at) = __float2bfloat16(outlier(j));
  }
}

template <class Input, Format kFormat>
int launch_wide_activation(WideActivationArguments const& args, int overlap, cudaStream_t stream) {
  // Few tokens: small CTAs on many multiprocessors.
  int const units = args.bricks * kBrickUnits;
  int threads = args.m <= kFew ? 128 : 256, per_thread = 1;
  int parts = ceil_div(units, threads) + (args.branch_columns ? 1 : 0);
  if (args.gain) {
    while (ceil_div(units, per_thread) > kMostThreads) per_thread *= 2;
    threads = ceil_div(ceil_div(units, per_thread), 32) * 32, parts = 1;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(args.m * parts), config.blockDim = threads;
  config.stream = stream, config.attrs = &attribute, config.numAttrs = overlap ? 1 : 0;
  auto launch = [&](auto hadamard, auto of_thread, auto source) -> int {
    return cudaLaunchKernelEx(
        &config,
        quantize_wide_tokens<Input, kFormat, decltype(of_thread)::value, decltype(hadamard)::value,
                             decltype(source)::value>,
        args);
  };
  auto run = [&](auto of_thread, auto source) {
    return args.hadamard ? launch(std::true_type{}, of_thread, source)
                         : launch(std::false_type{}, of_thread, source);
  };
  using One = std::integral_constant<int, 1>;
  using Normed = std::integral_constant<Source, Source::kNormed>;
  if (!args.gain && args.gated) return run(One{}, std::integral_constant<Source, Source::kGated>{});
  if (!args.gain) return run(One{}, std::integral_constant<Source, Source::kPlain>{});
  switch (per_thread) {
    case 1:
      return run(One{}, Normed{});
    case 2:
      return run(std::integral_constant<int, 2>{}, Normed{});
    case 4:
      return run(std::integral_constant<int, 4>{}, Normed{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace quantkit::sm90

#define QUANTKIT_SM90_WIDE_ACTIVATION(NAME, INPUT, FORMAT)                                  \
  extern "C" int NAME(quantkit::sm90::WideActivationArguments const* args, int overlap,     \
                      void* stream) {                                                       \
    return quantkit::sm90::launch_wide_activation<INPUT, quantkit::sm90::Format::FORMAT>(   \
        *args, overlap, static_cast<cudaStream_t>(stream));                                 \
  }
