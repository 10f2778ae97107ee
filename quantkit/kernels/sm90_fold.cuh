// MXFP4 of an activation kernel's thread: block scales, nearest E2M1 values, the fold to E5M2 under
// one power of two a token, and how many blocks are too low for one running sum.
#pragma once

#include "sm90_activation_parts.cuh"

namespace quantkit::sm90 {

// Biased exponent of the block scale: 255 for NaN, a large negative number for a block of zeros.
CUTLASS_DEVICE int scale_exponent(int largest, int carry) {
  if (largest >= 0x7F800000) return 255;
  int const exponent = min(max(((largest + carry) >> 23) - 2, 0), 252);
  return largest ? exponent : -1024;
}

// Factors that take numbers to multiples of the block scale and these to multiples of the token's.
struct Factors {
  float to_block, to_token;
};
CUTLASS_DEVICE Factors factors_of(int exponent, int token_exponent) {
  if (exponent == 255) return {1.f, __int_as_float(0x7FC00000)};
  int const block = max(exponent, 0), apart = block - token_exponent;
  return {block ? power_of_two(254 - block) : 0x1p127f, power_of_two(max(127 + apart, 0))};
}

// Nearest E2M1 multiples of the block scale (ties to even), as 16 E5M2 bytes.
CUTLASS_DEVICE uint4 quantize(float const (&f)[kUnit], Factors const& factors) {
  uint32_t bytes[4];
#pragma unroll
  for (int i = 0; i < kUnit; i += 2) {
    float v[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // One mantissa bit, and steps of 1/2 below 1: the sum with 1.5 x 2^22 times the leading power
      // of two has its last bit there.
      float const x = f[i + h] * factors.to_block;
      int const leading = max(__float_as_int(x) & 0x7F800000, 0x3F800000);
      float const magic = __int_as_float(leading + (22 << 23 | 0x400000));
      float const rounded = fminf((fabsf(x) + magic) - magic, 6.f);
      v[h] = __int_as_float(__float_as_int(rounded) | (__float_as_int(x) & 0x80000000)) *
             factors.to_token;
    }
    uint16_t const pair = to_e5m2x2(v[0], v[1]);
    bytes[i / 4] = i % 4 ? bytes[i / 4] | uint32_t(pair) << 16 : pair;
  }
  return make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
}

// A power of two in both halves.
CUTLASS_DEVICE __nv_bfloat162 twice(float v) { return __floats2bfloat162_rn(v, v); }

// The same of bfloat16, two at a time: the last bit of their sums is that of 2^6 instead of 2^22.
CUTLASS_DEVICE uint4 quantize(uint4 const (&raw)[2], Factors const& factors) {
  uint32_t const words[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w,
                             raw[1].x, raw[1].y, raw[1].z, raw[1].w};
  __nv_bfloat162 const to_block = twice(factors.to_block), to_token = twice(factors.to_token);
  uint32_t bytes[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t const x = bits_of(__hmul2(pair_of(words[i]), to_block)), magnitude = x & 0x7FFF7FFFu;
    uint32_t const leading = __vmaxu2(magnitude, 0x3F803F80u) & 0x7F807F80u;
    __nv_bfloat162 const magic = pair_of(leading + 0x03400340u);
    __nv_bfloat162 const rounded = __hsub2_rn(__hadd2_rn(pair_of(magnitude), magic), magic);
    uint32_t const most_6 = __vminu2(bits_of(rounded), 0x40C040C0u) | (x & 0x80008000u);
    uint32_t const v = bits_of(__hmul2(pair_of(most_6), to_token));
    uint16_t const pair = to_e5m2x2(__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u));
    bytes[i / 2] = i % 2 ? bytes[i / 2] | uint32_t(pair) << 16 : pair;
  }
  return make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
}

// A sum of squares in 256ths of the square of scale `top`, to be added up as integers.
CUTLASS_DEVICE int in_scales(float square, int top) {
  float const inverse = power_of_two(254 - top);
  return int(fminf(square * inverse * inverse * 256.f, 0x1p21f));
}

// Blocks whose scale is 2^-10 of the token's norm or less have bits under 2^-13 of an ordinary
// sum: where they are more than a sixteenth, one narrow running sum would lose too much. Norms
// whose square a float does not hold count as such. `square`: see in_scales.
template <int Units>
CUTLASS_DEVICE int low_units(int const (&exponent)[Units], int top, int square) {
  int low = 0;
#pragma unroll
  for (int v = 0; v < Units; ++v)
    low += exponent[v] >= 0 && (top < 80 || 2 * (top - exponent[v]) >= __clz(square) - 3);
  return __reduce_add_sync(~0u, low);
}

}  // namespace quantkit::sm90
