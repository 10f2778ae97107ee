// Parts of the activation kernels: a token's numbers, through RMSNorm or SwiGLU and the Hadamard
// to what is quantized.
#pragma once

#include "sm90_atoms.cuh"

namespace quantkit::sm90 {

// What is quantized: x, silu(gate) * up of x = [gate, up], or x over its root mean square, times a
// gain a channel.
enum class Source { kPlain, kGated, kNormed };

constexpr int kFew = 128;  // tokens at which latency counts, not throughput
constexpr int kUnit = 16;  // elements a thread takes at a time; two threads share a block of 32
// Threads of a CTA at most: more units a thread need more registers.
constexpr int most_threads(int units) { return units == 4 ? 256 : 512; }

CUTLASS_DEVICE int absolute_bits(float v) { return __float_as_int(v) & 0x7FFFFFFF; }
CUTLASS_DEVICE float power_of_two(int biased) { return __int_as_float(biased << 23); }

CUTLASS_DEVICE uint32_t bits_of(__nv_bfloat162 v) { return reinterpret_cast<uint32_t&>(v); }
CUTLASS_DEVICE __nv_bfloat162 pair_of(uint32_t v) { return reinterpret_cast<__nv_bfloat162&>(v); }

template <class Input>
CUTLASS_DEVICE float to_float(Input v) {
  if constexpr (std::is_same_v<Input, __half>)
    return __half2float(v);
  else
    return __bfloat162float(v);
}

// [16 elements] of a token as floats: outliers zeroed, Hadamard applied.
template <class Input, bool Hadamard>
CUTLASS_DEVICE void unpack(uint4 const (&raw)[2], float (&f)[kUnit], int hadamard) {
  uint32_t const words[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w,
                             raw[1].x, raw[1].y, raw[1].z, raw[1].w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if constexpr (std::is_same_v<Input, __half>) {
      float2 const v = __half22float2(reinterpret_cast<__half2 const&>(words[i]));
      f[2 * i] = v.x, f[2 * i + 1] = v.y;
    } else {
      f[2 * i] = __uint_as_float(words[i] << 16),
            f[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    }
  }
  if constexpr (Hadamard) {
#pragma unroll
    for (int width = 1; width < kUnit; width *= 2) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (i & width) continue;
        float const a = f[i], b = f[i + width];
        f[i] = a + b, f[i + width] = a - b;
      }
    }
    for (int lanes = 1; lanes * kUnit < hadamard; lanes *= 2) {
      float const sign = threadIdx.x & lanes ? -1.f : 1.f;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) f[i] = __shfl_xor_sync(~0u, f[i], lanes) + sign * f[i];
    }
    float const norm = rsqrtf(float(hadamard));
#pragma unroll
    for (int i = 0; i < kUnit; ++i) f[i] *= norm;
  }
}

// Largest magnitude of the 32-block that this thread and its neighbour hold, as bits.
CUTLASS_DEVICE int block_maximum(float const (&f)[kUnit]) {
  int largest = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) largest = max(largest, absolute_bits(f[i]));
  return max(largest, __shfl_xor_sync(~0u, largest, 1));
}

// The same of 16-bit numbers, two at a time.
template <class Input>
CUTLASS_DEVICE int block_maximum(uint4 const (&raw)[2]) {
  uint32_t const words[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w,
                             raw[1].x, raw[1].y, raw[1].z, raw[1].w};
  uint32_t both = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) both = __vmaxu2(both, words[i] & 0x7FFF7FFFu);
  both = __vmaxu2(both, __shfl_xor_sync(~0u, both, 1));
  uint16_t const largest = max(both & 0xFFFF, both >> 16);
  return __float_as_int(to_float(reinterpret_cast<Input const&>(largest)));
}

template <class Input>
CUTLASS_DEVICE Input from_float(float v) {
  if constexpr (std::is_same_v<Input, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

// silu(gate) * up, rounded where two kernels would have written it.
template <class Input>
CUTLASS_DEVICE Input gated_product(Input gate, Input up) {
  float const g = to_float(gate);
  Input const activated = from_float<Input>(__fdividef(g, 1.f + __expf(-g)));
  return from_float<Input>(to_float(activated) * to_float(up));
}

template <class Input>
CUTLASS_DEVICE uint4 gated_product(uint4 gate, uint4 const& up) {
  Input* const g = reinterpret_cast<Input*>(&gate);
#pragma unroll
  for (int i = 0; i < 8; ++i) g[i] = gated_product(g[i], reinterpret_cast<Input const*>(&up)[i]);
  return gate;
}

// x / rms * gain, rounded where torch rounds: before the gain and after it.
template <class Input>
CUTLASS_DEVICE Input normalized(Input x, Input gain, float inverse_rms) {
  Input const v = from_float<Input>(to_float(x) * inverse_rms);
  return from_float<Input>(to_float(gain) * to_float(v));
}

template <class Input>
CUTLASS_DEVICE uint4 normalized(uint4 x, uint4 const& gain, float inverse_rms) {
  Input* const v = reinterpret_cast<Input*>(&x);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    v[i] = normalized(v[i], reinterpret_cast<Input const*>(&gain)[i], inverse_rms);
  return x;
}

template <class Input>
CUTLASS_DEVICE float sum_of_squares(uint4 const& x) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float const v = to_float(reinterpret_cast<Input const*>(&x)[i]);
    sum += v * v;
  }
  return sum;
}

// The same to a part in 64, sooner.
template <class Input>
CUTLASS_DEVICE float about_sum_of_squares(uint4 const& x) {
  if constexpr (std::is_same_v<Input, __nv_bfloat16>) {
    __nv_bfloat162 const* const v = reinterpret_cast<__nv_bfloat162 const*>(&x);
    __nv_bfloat162 sum = __hmul2(v[0], v[0]);
#pragma unroll
    for (int i = 1; i < 4; ++i) sum = __hfma2(v[i], v[i], sum);
    return to_float(sum.x) + to_float(sum.y);
  }
  return sum_of_squares<Input>(x);
}

CUTLASS_DEVICE float warp_sum(float v) {  // the same in every lane
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
  return v;
}

// Sum over the CTAs that share a token of what each thread has; in one order on every run.
CUTLASS_DEVICE float token_sum(float mine, int ctas, float (&of_warp)[16], float& of_cta) {
  int const lane = threadIdx.x % 32;
  mine = warp_sum(mine);
  if (lane == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  float sum = warp_sum(lane < blockDim.x / 32 ? of_warp[lane] : 0.f);
  if (ctas > 1) {
    if (threadIdx.x == 0) of_cta = sum;
    cute::cluster_arrive();
    cute::cluster_wait();
    int const rank = min(lane, ctas - 1);
    int const bits =
        load_cluster_32(cute::set_block_rank(cute::cast_smem_ptr_to_uint(&of_cta), rank));
    sum = warp_sum(lane < ctas ? __int_as_float(bits) : 0.f);
  }
  return sum;
}

}  // namespace quantkit::sm90
