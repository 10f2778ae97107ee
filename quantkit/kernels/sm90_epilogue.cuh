// After the main loop: adding up the parts of a tile, scales, bias, and the store.
#pragma once

#include "sm90_atoms.cuh"

namespace quantkit::sm90 {

enum OutputType { kBf16 = 0, kFp16 = 1, kFp32 = 2 };

// Mirrored by sm90.py (GemmArguments).
struct Arguments {
  uint8_t const* weights;      // [row block][brick], branch bricks after the main ones
  uint8_t const* tokens;       // [token tile][brick], branch bricks after the main ones
  // Scales are negative where block scales of the row or token lie far apart (prefill asks).
  float4 const* rows;          // a weight row: scale, bias, branch scale / scale, 0
  float2 const* token_scales;  // a token: scale, branch scale / scale
  void* out;                   // [m, n]
  float* partials;             // a CTA: one tile of sums in fragment order
  uint32_t* flags;             // a CTA: its partial sum is written; 0 between launches
  int64_t token_tile_bytes;
  int m, n, row_blocks, row_tiles, token_tiles, bricks, branch_bricks;
  int split;     // tiles are shared by CTAs
  int ahead;     // first steps whose weights are fetched while the kernel before ends
  int out_type;  // OutputType
};

template <int Tokens, int KGroups>
struct TileEpilogue {
  static constexpr int kStaged = Tokens > 64 ? 64 : Tokens > 32 ? 32 : Tokens;  // tokens a pass
  static constexpr int kPitch = 128;  // 64 rows of 16 bits, 16-byte chunk c of token r at c ^ r % 8
  static constexpr int kPartsAt = kStaged * kPitch;
  static constexpr int kTokens = Tokens, kSums = Tokens / 2;  // sums of a thread
  static constexpr int kSumBytes = Tokens * 256;              // of 64 rows
  static constexpr int kBytes = kPartsAt + (KGroups - 1) * kSumBytes;

  static_assert(Tokens % 8 == 0);

  // ---- sums in shared memory: fragment order, 16 bytes a thread at a time

  CUTLASS_DEVICE static void write(uint32_t part, float const (&sum)[kSums], int thread) {
#pragma unroll
    for (int j = 0; j < Tokens / 8; ++j) {
      store_shared_128(part + (j * 128 + thread) * 16, sum[4 * j], sum[4 * j + 1], sum[4 * j + 2],
                       sum[4 * j + 3]);
    }
  }

  CUTLASS_DEVICE static void add(uint32_t part, float (&sum)[kSums], int thread) {
#pragma unroll
    for (int j = 0; j < Tokens / 8; ++j) {
      uint4 const v = load_shared_128(part + (j * 128 + thread) * 16);
      sum[4 * j] += __uint_as_float(v.x), sum[4 * j + 1] += __uint_as_float(v.y);
      sum[4 * j + 2] += __uint_as_float(v.z), sum[4 * j + 3] += __uint_as_float(v.w);
    }
  }

  // To another CTA of the cluster; `part` and `barrier` are cute::set_block_rank's.
  CUTLASS_DEVICE static void send(uint32_t part, uint32_t barrier, float const (&sum)[kSums],
                                  int thread) {
#pragma unroll
    for (int j = 0; j < Tokens / 8; ++j) {
      send_128(part + (j * 128 + thread) * 16, barrier, sum[4 * j], sum[4 * j + 1], sum[4 * j + 2],
               sum[4 * j + 3]);
    }
  }

  // ---- sums in the workspace

  CUTLASS_DEVICE static float4* partial(Arguments const& args, int cta, int row_groups,
                                        int row_group, int thread) {
    return reinterpret_cast<float4*>(args.partials) +
           (size_t(cta) * row_groups + row_group) * (Tokens / 8) * 128 + thread;
  }

  CUTLASS_DEVICE static void write_partial(float4* slot, float const (&sum)[kSums]) {
#pragma unroll
    for (int j = 0; j < Tokens / 8; ++j) {
      __stcg(slot + j * 128,
             make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]));
    }
  }

  CUTLASS_DEVICE static void add_partial(float4 const* slot, float (&sum)[kSums]) {
#pragma unroll
    for (int j = 0; j < Tokens / 8; ++j) {
      float4 const v = __ldcg(slot + j * 128);
      sum[4 * j] += v.x, sum[4 * j + 1] += v.y, sum[4 * j + 2] += v.z, sum[4 * j + 3] += v.w;
    }
  }

  // ---- out[token, row] of this warpgroup's 64 rows; `scales` is the shared copy of the tokens'

  CUTLASS_DEVICE static void store(Arguments const& args, float const (&sum)[kSums],
                                   float4 const (&rows)[2], uint32_t scales, uint32_t staging,
                                   int row0, int token0, int thread, int barrier) {
    int const lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    // n8 tile j of the fragment, element i: row i / 2, token i % 2.
    auto token_pair = [&](int j) { return load_shared_128(scales + (8 * j + 2 * t) * 8); };
    auto value = [&](int j, int i, uint4 const& pair) {
      uint32_t const scale = i % 2 ? pair.z : pair.x;
      return sum[4 * j + i] * fabsf(rows[i / 2].x * __uint_as_float(scale)) + rows[i / 2].y;
    };
    if (args.out_type == kFp32) {
      float* const out = static_cast<float*>(args.out);
#pragma unroll
      for (int j = 0; j < Tokens / 8; ++j) {
        uint4 const pair = token_pair(j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int const token = token0 + 8 * j + 2 * t + i % 2, row = row0 + warp * 16 + g + i / 2 * 8;
          if (token < args.m && row < args.n) out[size_t(token) * args.n + row] = value(j, i, pair);
        }
      }
      return;
    }
    auto pack = [&](float low, float high) {
      if (args.out_type == kBf16) {
        __nv_bfloat162 const v = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<uint32_t const&>(v);
      }
      __half2 const v = __floats2half2_rn(low, high);
      return reinterpret_cast<uint32_t const&>(v);
    };
    uint16_t* const out = static_cast<uint16_t*>(args.out);
#pragma unroll
    for (int pass = 0; pass < Tokens / kStaged; ++pass) {
#pragma unroll
      for (int jj = 0; jj < kStaged / 8; ++jj) {
        int const j = pass * (kStaged / 8) + jj;
        uint4 const pair = token_pair(j);
        uint32_t const at = staging + (jj * 8 + lane % 8) * kPitch +
                            ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
        store_matrices(at, pack(value(j, 0, pair), value(j, 1, pair)),
                       pack(value(j, 2, pair), value(j, 3, pair)));
      }
      barrier_sync(barrier, 128);
#pragma unroll
      for (int i = 0; i < ceil_div(kStaged * 8, 128); ++i) {
        int const chunk = i * 128 + thread, token = chunk / 8, row = row0 + chunk % 8 * 8;
        if (token >= kStaged || token0 + pass * kStaged + token >= args.m || row >= args.n)
          continue;
        uint4 const v = load_shared_128(staging + token * kPitch + (chunk ^ token) % 8 * 16);
        uint16_t* const to = out + size_t(token0 + pass * kStaged + token) * args.n + row;
        if (args.n % 8 == 0) {
          *reinterpret_cast<uint4*>(to) = v;
        } else {
          uint32_t const words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            if (row + e < args.n) to[e] = words[e / 2] >> (e % 2 * 16);
          }
        }
      }
      if (pass + 1 < Tokens / kStaged) barrier_sync(barrier, 128);
    }
  }
};

}  // namespace quantkit::sm90
