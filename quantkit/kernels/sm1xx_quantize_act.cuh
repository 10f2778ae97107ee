// Activations for the Blackwell GEMM: SwiGLU where the input is gate and up, gather the outlier
// channels, zero them, rotate the rest in blocks, choose block scales, round to the element, write
// codes and scale tiles, in one pass.
//
// One thread owns one scale block of one token, so a block's maximum needs no exchange. Plain CUDA
// that runs on any GPU, converting with the hardware instruction where there is one; the same
// function also runs on the host, where tests compare its bytes with quantkit.formats.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <cuda/std/bit>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp4.h>
#include <cuda_fp8.h>

namespace quantkit {

enum class Format { mxfp4, mxfp8, nvfp4 };

struct QuantizeArguments {
  void const* x;               // [tokens, k] bf16 or fp16, rows `stride` elements apart; gated:
                               // [tokens, 2 k], gate before up
  uint32_t const* mask;        // bit c % 32 of word c / 32: channel c is an outlier; null: none
  int const* index;            // [outliers] channels, -1 for padding
  float const* divisor;        // NVFP4: what values are multiplied by before block scales, one
  uint8_t* codes;              // [tokens, k] packed
  uint8_t* scales;             // 128x4 tiles
  void* gathered;              // [tokens, outliers], the type of x
  int64_t stride;
  int tokens, k, outliers;
  int carry;                   // the scale rule: added to a float's bits before taking the exponent
};

// Offset of a block's scale: tiles of 128 rows x 4 blocks, 512 bytes each, blocks fastest.
__host__ __device__ inline int64_t scale_offset(int row, int block, int block_tiles) {
  int64_t tile = int64_t(row / 128) * block_tiles + block / 4;
  return tile * 512 + (row % 32) * 16 + (row / 32 % 4) * 4 + block % 4;
}

__host__ __device__ inline float power_of_two(int exponent) {  // -127 .. 127
  return cuda::std::bit_cast<float>(exponent > -127 ? (exponent + 127) << 23 : 1 << 22);
}

// One aligned access of 16 or 8 bytes; types may differ.
__host__ __device__ inline void copy16(void* to, void const* from) {
  uint4 word;
  memcpy(&word, __builtin_assume_aligned(from, 16), 16);
  memcpy(__builtin_assume_aligned(to, 16), &word, 16);
}

__host__ __device__ inline void copy8(void* to, void const* from) {
  uint2 word;
  memcpy(&word, __builtin_assume_aligned(from, 8), 8);
  memcpy(__builtin_assume_aligned(to, 8), &word, 8);
}

// Multiply 32 values by the orthonormal Hadamard matrix of size 32.
__host__ __device__ inline void hadamard32(float (&v)[32]) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if ((i & step) == 0) {
        float a = v[i], b = v[i + step];
        v[i] = a + b;
        v[i + step] = a - b;
      }
    }
  }
#pragma unroll
  for (float& value : v) value *= 0.17677669529663687f;  // 32^-1/2
}

// silu(gate) * up, rounded where two kernels would have written it.
template <class Input>
__host__ __device__ Input gated_product(Input gate, Input up) {
  float const g = static_cast<float>(gate);
  Input const activated = Input(g / (1.f + expf(-g)));
  return Input(static_cast<float>(activated) * static_cast<float>(up));
}

template <class Input, bool Gated>
__host__ __device__ void gather_outlier(QuantizeArguments const& a, int token, int j) {
  auto const* row = static_cast<Input const*>(a.x) + token * a.stride;
  int const channel = a.index[j];
  Input value(0.f);
  if (channel >= 0) {
    value = row[channel];
    if constexpr (Gated) value = gated_product(value, row[a.k + channel]);
  }
  static_cast<Input*>(a.gathered)[int64_t(token) * a.outliers + j] = value;
}

template <Format F>
inline constexpr int block_size = F == Format::nvfp4 ? 16 : 32;

template <class Input, Format F, bool Hadamard, bool Gated>
__host__ __device__ void quantize_block(QuantizeArguments const& a, int token, int block) {
  constexpr int Block = block_size<F>;
  static_assert(!Hadamard || Block == 32, "the rotation runs inside one thread's block");
  int const blocks = a.k / Block;
  int const tiles = (blocks + 3) / 4;
  uint8_t* scale = a.scales + scale_offset(token, block, tiles);
  if (block >= blocks) {  // the tile's last columns: the MMA multiplies them with zero codes
    *scale = 0;
    return;
  }

  float v[Block];
  auto const* row = static_cast<Input const*>(a.x) + token * a.stride;
#pragma unroll
  for (int i = 0; i < Block; i += 8) {
    alignas(16) Input eight[8];
    copy16(eight, row + block * Block + i);
    if constexpr (Gated) {
      alignas(16) Input up[8];
      copy16(up, row + a.k + block * Block + i);
#pragma unroll
      for (int j = 0; j < 8; ++j) eight[j] = gated_product(eight[j], up[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) v[i + j] = static_cast<float>(eight[j]);
  }
  if (a.mask != nullptr) {
    uint32_t outliers = a.mask[block * Block / 32] >> (block * Block % 32);
#pragma unroll
    for (int i = 0; i < Block; ++i) v[i] = (outliers >> i) & 1 ? 0.f : v[i];
  }
  if constexpr (Hadamard) hadamard32(v);

  float amax = 0.f;
  bool finite = true;  // fmaxf drops a NaN
#pragma unroll
  for (float value : v) {
    amax = fmaxf(amax, fabsf(value));
    finite = finite && fabsf(value) <= 3.4028234663852886e38f;
  }

  if constexpr (F == Format::nvfp4) {
    float const divisor = *a.divisor;
    float wanted = divisor * (amax / 6.f);
    __nv_fp8_storage_t code = __nv_cvt_float_to_fp8(wanted, __NV_SATFINITE, __NV_E4M3);
    if (amax != 0.f && code == 0) code = 1;  // a block of non-zero values never gets scale zero
    if (!finite) code = 0x7f;
    float const decoded = __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
    float const step = code == 0 ? 1.f : decoded / divisor;
    *scale = code;
#pragma unroll
    for (float& value : v) value /= step;
  } else {
    constexpr int Emax = F == Format::mxfp4 ? 2 : 8;
    int exponent = ((cuda::std::bit_cast<int>(amax) + a.carry) >> 23) - 127 - Emax;
    exponent = max(-127, min(127 - Emax, exponent));
    *scale = finite ? uint8_t(exponent + 127) : 255;
    float const inverse = power_of_two(-exponent);
#pragma unroll
    for (float& value : v) value *= inverse;
  }

  int64_t const first = int64_t(token) * a.k + block * Block;  // element
  if constexpr (F == Format::mxfp8) {
    alignas(16) __nv_fp8x2_storage_t codes[16];
#pragma unroll
    for (int i = 0; i < 16; ++i)
      codes[i] = __nv_cvt_float2_to_fp8x2({v[2 * i], v[2 * i + 1]}, __NV_SATFINITE, __NV_E4M3);
    copy16(a.codes + first, codes);
    copy16(a.codes + first + 16, codes + 8);
  } else {
    alignas(16) __nv_fp4x2_storage_t codes[Block / 2];
#pragma unroll
    for (int i = 0; i < Block / 2; ++i)  // the even column in the low nibble
      codes[i] = __nv_cvt_float2_to_fp4x2({v[2 * i], v[2 * i + 1]}, __NV_E2M1, cudaRoundNearest);
    if constexpr (Block == 32) {
      copy16(a.codes + first / 2, codes);
    } else {
      copy8(a.codes + first / 2, codes);
    }
  }
}

template <Format F>
__host__ __device__ int padded_blocks(int k) {
  return (k / block_size<F> + 3) / 4 * 4;
}

template <class Input, Format F, bool Hadamard, bool Gated>
__global__ void __launch_bounds__(128) quantize_act(QuantizeArguments a) {
  int const token = blockIdx.x;
  int const thread = blockIdx.y * blockDim.x + threadIdx.x;
  for (int j = thread; j < a.outliers; j += gridDim.y * blockDim.x)
    gather_outlier<Input, Gated>(a, token, j);
  if (thread < padded_blocks<F>(a.k)) quantize_block<Input, F, Hadamard, Gated>(a, token, thread);
}

template <class Input, Format F, bool Hadamard, bool Gated>
int launch_quantize_act(QuantizeArguments const& args, cudaStream_t stream) {
  dim3 grid(args.tokens, (padded_blocks<F>(args.k) + 127) / 128);
  quantize_act<Input, F, Hadamard, Gated><<<grid, 128, 0, stream>>>(args);
  auto error = cudaGetLastError();
  return error == cudaSuccess ? 0 : 100 + static_cast<int>(error);
}

template <class Input, Format F, bool Hadamard, bool Gated>
void quantize_act_on_host(QuantizeArguments const& args) {
  for (int token = 0; token < args.tokens; ++token) {
    for (int j = 0; j < args.outliers; ++j) gather_outlier<Input, Gated>(args, token, j);
    for (int block = 0; block < padded_blocks<F>(args.k); ++block)
      quantize_block<Input, F, Hadamard, Gated>(args, token, block);
  }
}

}  // namespace quantkit

#define QUANTKIT_EXPORT_QUANTIZE(...)                                                     \
  extern "C" int run(quantkit::QuantizeArguments const* args, void* stream) {             \
    return quantkit::launch_quantize_act<__VA_ARGS__>(*args,                              \
                                                      static_cast<cudaStream_t>(stream)); \
  }                                                                                       \
  extern "C" void run_on_host(quantkit::QuantizeArguments const* args) {                  \
    quantkit::quantize_act_on_host<__VA_ARGS__>(*args);                                   \
  }
