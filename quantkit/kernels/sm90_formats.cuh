// Weight formats in their Hopper execution layout, and how each becomes wgmma's A operand.
//
// A *brick* is what four k-steps of one 64-row block read: a contiguous piece of memory that
// prepare.py writes. Tokens come as the matching brick of 128 bytes a token. A thread of the
// warpgroup owns rows g and g + 8 of its warp's 16 (g = lane / 4) and, of every 32 bytes of K,
// bytes 4t..4t+3 and 16+4t..16+4t+3 (t = lane % 4): the layout of wgmma's A fragment.
#pragma once

#include "sm90_atoms.cuh"

namespace quantkit::sm90 {

// Bytes and halves by dot products with one: they take the multipliers' pipe, and bit operations
// are what decoding is short of.
CUTLASS_DEVICE uint32_t byte_of(uint32_t word, int i) { return __dp4a(word, 1u << (8 * i), 0u); }
CUTLASS_DEVICE uint32_t upper_half(uint32_t word) { return __dp2a_lo(word, 0x100u, 0u); }

// Eight E2M1 codes of one row to two registers of E5M2: value = code * 2^(exponent - 8).
//
// E2M1 times 2^e is a normal E5M2 number for any e of 16 octaves, so a table of the eight
// magnitudes is two multiply-adds of the exponent, and PRMT looks four codes up at once. Code 0
// stays byte 0: its byte takes no part in the multiplication. Bits 0-2 of a nibble hold a
// magnitude. The sign of code i of the first register is bit 8i+7, of the second bit 8i+3.
CUTLASS_DEVICE void fold_e2m1(uint32_t word, uint32_t exponent, uint32_t& first, uint32_t& second) {
  uint32_t low = exponent * 0x04040400u + 0x1E1C1800u;   // 0, 0.5, 1, 1.5
  uint32_t high = exponent * 0x04040404u + 0x26242220u;  // 2, 3, 4, 6
  uint32_t select = word & 0x77777777u;
  first = permute(low, high, select) | (word & 0x80808080u);
  second = permute(low, high, upper_half(select)) | ((word << 4) & 0x80808080u);
}

// MXFP4: 64 rows x 128 columns. [k-step pair][thread][16 B of codes], then [warp][g][4 B]: nibble
// j is the exponent of k-step j, of row g in the low half and of row g + 8 in the high half.
template <class Token_>
struct Mxfp4 {
  using Weight = cutlass::float_e5m2_t;
  using Token = Token_;
  static constexpr int kStepElements = 32;
  static constexpr int kBytes = 64 * 128 / 2 + 64 * 4 / 2;
  static constexpr bool kNarrowSum = true;  // FP8 wgmma adds with about 14 bits

  CUTLASS_DEVICE static void decode(uint32_t (&a)[4][4], uint32_t brick, int thread) {
    uint32_t const packed = load_shared_32(brick + 4096 + (thread >> 2) * 4);
    uint32_t const even = packed & 0x0F0F0F0Fu, odd = (packed >> 4) & 0x0F0F0F0Fu;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint4 const codes = load_shared_128(brick + pair * 2048 + thread * 16);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t (&step)[4] = a[2 * pair + j];
        uint32_t const exponents = j ? odd : even;
        fold_e2m1(j ? codes.z : codes.x, byte_of(exponents, pair), step[0], step[2]);
        fold_e2m1(j ? codes.w : codes.y, byte_of(exponents, pair + 2), step[1], step[3]);
      }
    }
  }
};

// E2M1 codes under a bfloat16 scale of 16 columns, decoded to bfloat16: NVFP4, and MXFP4 beside
// activations that FP8 cannot hold exactly. 64 rows x 64 columns. [thread][k-step][4 B of codes],
// then [warp][g][row g, row g + 8][k-step]: scales. A word has the magnitudes of row g's codes for
// columns 2t, 2t+1, 8+2t, 8+2t+1 in bits 0-2 of its nibbles, then those of row g + 8. The signs of
// the four registers' two values are bits 15 and 31, 11 and 27, 7 and 23, 3 and 19.
struct Fp4InBf16 {
  using Weight = cutlass::bfloat16_t;
  using Token = cutlass::bfloat16_t;
  static constexpr int kStepElements = 16;
  static constexpr int kBytes = 64 * 64 / 2 + 64 * 4 * 2;
  static constexpr bool kNarrowSum = false;

  CUTLASS_DEVICE static void decode(uint32_t (&a)[4][4], uint32_t brick, int thread) {
    uint4 const codes = load_shared_128(brick + thread * 16);
    uint4 const scales = load_shared_128(brick + 2048 + (thread >> 2) * 16);
    uint32_t const words[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t const upper[2] = {scales.x, scales.y}, lower[2] = {scales.z, scales.w};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint32_t const which = s % 2 ? 0x3232 : 0x1010;
      uint32_t const of_row = __byte_perm(upper[s / 2], 0, which);
      uint32_t const of_row_8 = __byte_perm(lower[s / 2], 0, which);
      uint32_t const select = words[s] & 0x77777777u;
      expand(words[s], select, 0, of_row, a[s][0], a[s][2]);
      expand(words[s], upper_half(select), 8, of_row_8, a[s][1], a[s][3]);
    }
  }

 private:
  // 0, 0.5, 1, 1.5, 2, 3, 4, 6 by their bfloat16 bytes; signs move left by `shift` and 4 more.
  CUTLASS_DEVICE static void expand(uint32_t word, uint32_t select, int shift, uint32_t scale,
                                    uint32_t& first, uint32_t& second) {
    uint32_t const low = permute(0xC0800000u, 0xC0804000u, select);
    uint32_t const high = permute(0x3F3F3F00u, 0x40404040u, select);
    uint32_t const one = __byte_perm(low, high, 0x5140), two = __byte_perm(low, high, 0x7362);
    first = multiply_bf16x2(one | ((word << shift) & 0x80008000u), scale);
    second = multiply_bf16x2(two | ((word << (shift + 4)) & 0x80008000u), scale);
  }
};

// MXFP8 (E4M3 codes) decoded to bfloat16. 64 rows x 64 columns. [k-step pair][thread][row g, row
// g + 8][k-step][4 codes], then [warp][g][row g, row g + 8][32 columns]: the byte of a scale is the
// exponent of a bfloat16 that is 2^120 times the scale.
struct Mxfp8InBf16 {
  using Weight = cutlass::bfloat16_t;
  using Token = cutlass::bfloat16_t;
  static constexpr int kStepElements = 16;
  static constexpr int kBytes = 64 * 64 + 64 * 2;
  static constexpr bool kNarrowSum = false;

  CUTLASS_DEVICE static void decode(uint32_t (&a)[4][4], uint32_t brick, int thread) {
    uint32_t const scales = load_shared_32(brick + 4096 + (thread >> 2) * 4);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint4 const codes = load_shared_128(brick + pair * 2048 + thread * 16);
      uint32_t const upper = __byte_perm(scales, 0, pair ? 0x4141 : 0x4040) << 7;
      uint32_t const lower = __byte_perm(scales, 0, pair ? 0x4343 : 0x4242) << 7;
      expand(codes.x, upper, a[2 * pair][0], a[2 * pair][2]);
      expand(codes.y, upper, a[2 * pair + 1][0], a[2 * pair + 1][2]);
      expand(codes.z, lower, a[2 * pair][1], a[2 * pair][3]);
      expand(codes.w, lower, a[2 * pair + 1][1], a[2 * pair + 1][3]);
    }
  }

 private:
  // A code's bits, put where bfloat16 has them, are 2^-120 times its value: subnormals as well.
  CUTLASS_DEVICE static void expand(uint32_t codes, uint32_t scale, uint32_t& first,
                                    uint32_t& second) {
    uint32_t const low = __byte_perm(codes, 0, 0x4140), high = __byte_perm(codes, 0, 0x4342);
    first = multiply_bf16x2((low & 0x007F007Fu) << 4 | (low & 0x00800080u) << 8, scale);
    second = multiply_bf16x2((high & 0x007F007Fu) << 4 | (high & 0x00800080u) << 8, scale);
  }
};

// The branch: outlier columns kept in 16 or 8 bits, in fragment order, two k-steps a brick: 4 KB, or
// padded to a main brick where that is larger. Tokens come 64 bytes a token.
constexpr int kBranchBrick = 64 * 64;

struct NoBranch {
  static constexpr bool kPresent = false, kScaled = false;
};

struct Bf16Branch {  // weights divided by the row scale, activations by the token scale: exact
  using Element = cutlass::bfloat16_t;
  static constexpr bool kPresent = true, kScaled = false;
  static constexpr int kStepElements = 16;
};

struct ScaledBf16Branch {  // as it is, where the scales are no powers of two
  using Element = cutlass::bfloat16_t;
  static constexpr bool kPresent = true, kScaled = true;
  static constexpr int kStepElements = 16;
};

struct Fp8Branch {  // has scales of its own
  using Element = cutlass::float_e4m3_t;
  static constexpr bool kPresent = true, kScaled = true;
  static constexpr int kStepElements = 32;
};

CUTLASS_DEVICE void load_branch(uint32_t (&a)[2][4], uint32_t brick, int thread) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    uint4 const v = load_shared_128(brick + s * 2048 + thread * 16);
    a[s][0] = v.x, a[s][1] = v.y, a[s][2] = v.z, a[s][3] = v.w;
  }
}

}  // namespace quantkit::sm90
