// Activations to the B operand of sm90_gemm.cuh in one pass over a token: RMSNorm or SwiGLU before
// it where the model has that, outlier channels gathered for the branch and zeroed, block Hadamard,
// MXFP4 by the checkpoint's scale rule, folded to E5M2 under one power of two a token, written as
// the swizzled tile that a bulk copy brings in.
//
// The fold: an E2M1 value times its block scale, relative to the token's largest block, is an E5M2
// number for 27 octaves; blocks further below than that lose bits, then vanish.
#pragma once

#include "sm90_activation_parts.cuh"
#include "sm90_fold.cuh"

namespace quantkit::sm90 {

// Mirrored by sm90.py (ActivationArguments).
struct ActivationArguments {
  void const* x;             // [m, k], 16 bits an element; gated: [m, 2 k], gate before up
  void const* gain;          // [k], as x: x is normalised first; null: it is not
  uint16_t const* keep;      // [k]: 0 where an outlier channel leaves the main path; null: none
  int const* outlier_index;  // [branch_columns]: channel, or -1
  uint8_t* tokens;           // [token tile][brick], branch bricks after the main ones
  float2* token_scales;      // scale (negative: see low_units), branch scale / scale
  int64_t token_tile_bytes;
  int m, k, tile, bricks, branch_columns, branch_fp8;
  int carry;     // added to the bits of a block's largest magnitude: the scale rule
  int hadamard;  // channels mixed at a time: 0, or a power of two in 32..512
  int gated;     // silu(gate) * up is what is quantized
  float epsilon;  // added to the mean square
};

constexpr int kFarBranch = 60;  // octaves that the branch may lie above the main path's range
constexpr unsigned kArrival = 1 << 16;  // of a warp, above the units it counted

// Grid: x = tokens, y = CTAs of a cluster that share a token. `Units` a thread.
template <class Input, int Units, bool Hadamard, Source kSource>
__global__ void __launch_bounds__(most_threads(Units), Units > 4 ? 1 : Units == 4 ? 3 : 2)
    quantize_tokens(__grid_constant__ ActivationArguments const args) {
  constexpr bool kGated = kSource == Source::kGated, kNormed = kSource == Source::kNormed;
  __shared__ int warp_main[16], warp_branch[16], warp_square[16], cta_maximum[2];
  __shared__ unsigned low_arrived;
  cutlass::arch::launch_dependent_grids();
  // Unsigned: quotients by powers of two are shifts.
  unsigned const threads = blockDim.x, ctas = gridDim.y, part = blockIdx.y, thread = threadIdx.x;
  unsigned const token = blockIdx.x, lane = thread % 32, warps = threads / 32;
  unsigned const units = unsigned(args.k) / kUnit, columns = args.branch_columns;
  auto unit_of = [&](int v) { return (v * ctas + part) * threads + thread; };
  if (args.m <= kFew) {  // constants of the site, while the kernel before ends
#pragma unroll
    for (int v = 0; v < Units; ++v) {
      if (unit_of(v) >= units) continue;
      if (args.keep) prefetch(args.keep + unit_of(v) * kUnit);
      if constexpr (kNormed) prefetch(static_cast<Input const*>(args.gain) + unit_of(v) * kUnit);
    }
    unsigned const j = (part * threads + thread) * 8;
    if (j < columns) prefetch(args.outlier_index + j);
  }
  cutlass::arch::wait_on_dependent_grids();
  size_t const stride = kGated ? 2 * args.k : args.k;
  Input const* const row = static_cast<Input const*>(args.x) + token * stride;
  Input const* const gain = static_cast<Input const*>(args.gain);

  uint4 raw[Units][2];
#pragma unroll
  for (int v = 0; v < Units; ++v) {
    unsigned const unit = unit_of(v);
    raw[v][0] = raw[v][1] = make_uint4(0, 0, 0, 0);
    if (unit < units) {
      raw[v][0] = reinterpret_cast<uint4 const*>(row)[unit * 2];
      raw[v][1] = reinterpret_cast<uint4 const*>(row)[unit * 2 + 1];
      if constexpr (kGated) {
        uint4 const* const up = reinterpret_cast<uint4 const*>(row + args.k) + unit * 2;
        raw[v][0] = gated_product<Input>(raw[v][0], up[0]);
        raw[v][1] = gated_product<Input>(raw[v][1], up[1]);
      }
    }
  }
  auto keep_of = [&](int v, int h) {
    return __ldg(reinterpret_cast<uint4 const*>(args.keep) + unit_of(v) * 2 + h);
  };
  constexpr bool kEarly = Units <= 2;  // masks of more would not fit the registers
  uint4 keep[Units][2];
#pragma unroll
  for (int v = 0; v < Units; ++v) {
    if (kEarly && args.keep && unit_of(v) < units)
      keep[v][0] = keep_of(v, 0), keep[v][1] = keep_of(v, 1);
  }
  float inverse_rms = 0.f;
  if constexpr (kNormed) {
    __shared__ float of_warp[16], cta_square;
    float square = 0.f;
#pragma unroll
    for (int v = 0; v < Units; ++v)
      square += sum_of_squares<Input>(raw[v][0]) + sum_of_squares<Input>(raw[v][1]);
    square = token_sum(square, ctas, of_warp, cta_square);
    inverse_rms = rsqrtf(square / float(args.k) + args.epsilon);
#pragma unroll
    for (int v = 0; v < Units; ++v) {
      if (unit_of(v) >= units) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint4 const g = __ldg(reinterpret_cast<uint4 const*>(gain) + unit_of(v) * 2 + h);
        raw[v][h] = normalized<Input>(raw[v][h], g, inverse_rms);
      }
    }
  }
  int branch = 0;  // largest magnitude of the outlier channels, as bits
  auto outlier = [&](unsigned j) {
    int const channel = __ldg(args.outlier_index + j);
    if (channel < 0) return from_float<Input>(0.f);
    if constexpr (kGated) return gated_product(row[channel], row[args.k + channel]);
    if constexpr (kNormed) return normalized(row[channel], gain[channel], inverse_rms);
    return row[channel];
  };
  Input* const staged = reinterpret_cast<Input*>(dynamic_shared());  // until the scale is known
  for (unsigned j = part * threads + thread, at = thread; j < columns; j += ctas * threads) {
    staged[at] = outlier(j), branch = max(branch, absolute_bits(to_float(staged[at])));
    at += threads;
  }
  if (args.keep) {
#pragma unroll
    for (int v = 0; v < Units; ++v) {
      if (unit_of(v) >= units) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint4 const mask = kEarly ? keep[v][h] : keep_of(v, h);
        raw[v][h].x &= mask.x, raw[v][h].y &= mask.y, raw[v][h].z &= mask.z, raw[v][h].w &= mask.w;
      }
    }
  }
  bool const many_tokens = args.tile > 64;  // prefill, which sums up long runs
  float square = 0.f;
  int exponent[Units], top = 0;
#pragma unroll
  for (int v = 0; v < Units; ++v) {
    int largest;
    if constexpr (Hadamard) {
      float f[kUnit];
      unpack<Input, Hadamard>(raw[v], f, args.hadamard);
      largest = block_maximum(f);
    } else {
      largest = block_maximum<Input>(raw[v]);
    }
    exponent[v] = scale_exponent(largest, args.carry);
    if (exponent[v] < 255) top = max(top, exponent[v]);
    if (Units > 1 || many_tokens) {  // a Hadamard keeps the norm
#pragma unroll
      for (int h = 0; h < 2; ++h) square += about_sum_of_squares<Input>(raw[v][h]);
    }
  }

  // The token's largest block scale and outlier: over the warp, the CTA, the cluster.
  top = __reduce_max_sync(~0u, top), branch = __reduce_max_sync(~0u, branch);
  if (lane == 0) warp_main[thread / 32] = top, warp_branch[thread / 32] = branch;
  int norm = 0;
  if (many_tokens) {  // then a CTA has all of a token
    norm = __reduce_add_sync(~0u, in_scales(square, top));
    if (lane == 0) warp_square[thread / 32] = norm;
    if (thread == 0) low_arrived = 0;
  }
  __syncthreads();
  int const other = min(lane, warps - 1), top_of_warp = warp_main[other];
  top = __reduce_max_sync(~0u, top_of_warp),
  branch = __reduce_max_sync(~0u, warp_branch[other]);
  if (many_tokens) {
    int const apart = min(2 * (top - top_of_warp), 31);
    norm = __reduce_add_sync(~0u, lane < warps ? warp_square[other] >> apart : 0);
  }
  if (ctas > 1) {
    if (thread == 0) cta_maximum[0] = top, cta_maximum[1] = branch;
    cute::cluster_arrive();
    cute::cluster_wait();
    auto remote = [&](int const* mine) {
      uint32_t const address =
          cute::set_block_rank(cute::cast_smem_ptr_to_uint(mine), min(lane, ctas - 1));
      return __reduce_max_sync(~0u, load_cluster_32(address));
    };
    top = remote(&cta_maximum[0]), branch = remote(&cta_maximum[1]);
    cute::cluster_arrive_relaxed();  // waited for before this CTA's shared memory goes away
  }
  // 6 x the largest block scale is E5M2's last octave.
  int const token_exponent = max(max(top - 13, 1), (branch >> 23) - kFarBranch);
  float const inverse = power_of_two(254 - token_exponent);
  int const branch_exponent =
      max((min(branch, 0x7F7FFFFF) + (1 << 19)) >> 23, 9) - 8;  // E4M3, even rule
  unsigned const tile = args.tile, r = token & (tile - 1);  // of a power of two tokens
  uint8_t* const out = args.tokens + (token >> (31 - __clz(tile))) * args.token_tile_bytes;
  uint8_t* const mine = out + r * 128 + ((thread % 8 ^ r % 8) << 4);
#pragma unroll
  for (int v = 0; v < Units; ++v) {
    Factors const factors = factors_of(exponent[v], token_exponent);
    uint4 bytes;
    if constexpr (Hadamard || std::is_same_v<Input, __half>) {
      float f[kUnit];
      unpack<Input, Hadamard>(raw[v], f, args.hadamard);
      bytes = quantize(f, factors);
    } else {
      bytes = quantize(raw[v], factors);
    }
    unsigned const brick = unit_of(v) / 8;
    if (brick < args.bricks) *reinterpret_cast<uint4*>(mine + brick * (tile * 128)) = bytes;
  }
  uint8_t* const side = out + size_t(args.bricks) * tile * 128 + r * 64;
  for (unsigned j = part * threads + thread, at = thread; j < columns; j += ctas * threads) {
    float const v = to_float(staged[at]);
    unsigned const byte = args.branch_fp8 ? j : 2 * j;
    uint8_t* const to =
        side + byte / 64 * (tile * 64) + ((byte % 64 / 16 ^ r / 2 % 4) << 4) + byte % 16;
    if (args.branch_fp8) {
      *to = to_e4m3(v * power_of_two(254 - branch_exponent));
    } else {
      *reinterpret_cast<__nv_bfloat16*>(to) = __float2bfloat16(v * inverse);
    }
    at += threads;
  }

  bool last = thread == 0 && part == 0, mark = false;
  if (many_tokens) {  // the last warp to count writes for all
    unsigned const low = low_units(exponent, top, norm);
    unsigned const before = lane == 0 ? atomicAdd(&low_arrived, low + kArrival) : 0;
    last = lane == 0 && before / kArrival == warps - 1;
    mark = before % kArrival + low > units / 16;
  }
  if (last) {
    float const ratio = scalbnf(1.f, branch_exponent - token_exponent);
    float const scale = power_of_two(token_exponent);
    args.token_scales[token] = make_float2(mark ? -scale : scale, ratio);
  }
  if (ctas > 1) cute::cluster_wait();
}

template <class Input>
int launch_activation(ActivationArguments const& args, int overlap, cudaStream_t stream) {
  // Few tokens: a unit a thread; a second one takes less than finding the maximum in a cluster, but
  // not a third. Many: more units a thread, more loads in flight.
  int const units = args.bricks * 8;
  bool const few = args.m <= kFew;
  int const ctas = few && units > 1024 ? min(ceil_div(units, 512), 8) : 1;
  int const each = ceil_div(units, ctas);
  int per_thread = few || each <= 64 ? 1 : each <= 512 ? 2 : 4;  // at least
  while (ceil_div(each, per_thread) > most_threads(per_thread)) per_thread *= 2;
  int const threads = ceil_div(ceil_div(each, per_thread), 32) * 32;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = 1, attributes[0].val.clusterDim.y = ctas,
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(args.m, ctas), config.blockDim = threads;
  config.dynamicSmemBytes = ceil_div(args.branch_columns, ctas * threads) * threads * sizeof(Input);
  config.stream = stream, config.attrs = attributes, config.numAttrs = overlap ? 2 : 1;
  auto run = [&](auto hadamard, auto source) -> int {
    constexpr bool kHadamard = decltype(hadamard)::value;
    constexpr Source kSource = decltype(source)::value;
    switch (per_thread) {
      case 1:
        return cudaLaunchKernelEx(&config, quantize_tokens<Input, 1, kHadamard, kSource>, args);
      case 2:
        return cudaLaunchKernelEx(&config, quantize_tokens<Input, 2, kHadamard, kSource>, args);
      case 4:
        return cudaLaunchKernelEx(&config, quantize_tokens<Input, 4, kHadamard, kSource>, args);
      case 8:
        return cudaLaunchKernelEx(&config, quantize_tokens<Input, 8, kHadamard, kSource>, args);
    }
    return cudaErrorInvalidValue;
  };
  auto run_on = [&](auto source) {
    return args.hadamard ? run(std::true_type{}, source) : run(std::false_type{}, source);
  };
  if (args.gain) return run_on(std::integral_constant<Source, Source::kNormed>{});
  if (args.gated) return run_on(std::integral_constant<Source, Source::kGated>{});
  return run_on(std::integral_constant<Source, Source::kPlain>{});
}

}  // namespace quantkit::sm90

#define QUANTKIT_SM90_ACTIVATION(NAME, INPUT)                                           \
  extern "C" int NAME(quantkit::sm90::ActivationArguments const* args, int overlap,     \
                      void* stream) {                                                   \
    return quantkit::sm90::launch_activation<INPUT>(*args, overlap,                     \
                                                    static_cast<cudaStream_t>(stream)); \
  }
