// Stands in for sm90_atoms.cuh on a CPU: one fiber a CUDA thread, so that the sm90 kernels run
// unchanged where there is no GPU. Speed, memory ordering and the rounding of FP8 sums are not
// modelled. What is asynchronous happens as late as it may: a wgmma when its wait returns, a bulk
// copy some turns after its issue. Reads of what was never written give NaN, deadlocks are errors.
#pragma once

#include "emulated_cuda.cuh"

namespace cutlass {
struct float_e5m2_t { static constexpr auto kKind = emulated::Kind::kE5m2; };
struct float_e4m3_t { static constexpr auto kKind = emulated::Kind::kE4m3; };
struct bfloat16_t { static constexpr auto kKind = emulated::Kind::kBf16; };
namespace arch {
template <int> void warpgroup_reg_alloc() {}
template <int> void warpgroup_reg_dealloc() {}
inline void wait_on_dependent_grids() {}
inline void launch_dependent_grids() {}
inline void fence_barrier_init() {}
inline void fence_view_async_shared() {}
}  // namespace arch
}  // namespace cutlass

namespace quantkit::sm90 {
void finish_products(int groups_left);
}

namespace cute {
namespace SM90::GMMA { enum class ScaleOut { Zero = 0, One = 1 }; }
inline uint32_t cast_smem_ptr_to_uint(void const* at) {
  return uint32_t(static_cast<uint8_t const*>(at) - emulated::self->cta->shared);
}
inline uint32_t set_block_rank(uint32_t address, uint32_t rank) {
  EMULATED_REQUIRE(rank < emulated::self->cta->cluster->ctas.size());
  return address | rank << emulated::kRankBit;
}
inline void cluster_arrive_relaxed() {
  emulated::Cluster& cluster = *emulated::self->cta->cluster;
  emulated::self->cluster_turn = cluster.barrier.turn;
  emulated::meet(cluster.barrier, int(cluster.ctas.size()) * emulated::self->cta->threads);
}
inline void cluster_arrive() { cluster_arrive_relaxed(); }
inline void cluster_wait() {
  emulated::Named const& barrier = emulated::self->cta->cluster->barrier;
  emulated::wait_until("cluster", [&] { return barrier.turn != emulated::self->cluster_turn; });
}
inline void cluster_sync() { cluster_arrive(), cluster_wait(); }
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { ++emulated::self->group; }
template <int Left> void warpgroup_wait() { quantkit::sm90::finish_products(Left); }
}  // namespace cute

namespace quantkit::sm90 {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

inline uint8_t* shared_at(uint32_t address, uint32_t bytes) {
  EMULATED_REQUIRE(address % bytes == 0);
  EMULATED_REQUIRE(address + bytes <= emulated::kSharedSize);
  return emulated::self->cta->shared + address;
}
inline uint8_t* dynamic_shared() { return emulated::self->cta->shared + emulated::kSharedOffset; }
template <class V> V load_shared(uint32_t address) {
  V v;
  std::memcpy(&v, shared_at(address, sizeof v), sizeof v);
  return v;
}
inline uint4 load_shared_128(uint32_t address) { return load_shared<uint4>(address); }
inline uint2 load_shared_64(uint32_t address) { return load_shared<uint2>(address); }
inline uint32_t load_shared_32(uint32_t address) { return load_shared<uint32_t>(address); }
inline int load_cluster_32(uint32_t) {
  emulated::require(false, "no clusters of the activation kernel");
  return 0;
}
inline void store_shared_128(uint32_t address, float a, float b, float c, float d) {
  float4 const v{a, b, c, d};
  std::memcpy(shared_at(address, sizeof v), &v, sizeof v);
}
inline void send_128(uint32_t address, uint32_t barrier, float a, float b, float c, float d) {
  EMULATED_REQUIRE(address >> emulated::kRankBit == barrier >> emulated::kRankBit);
  EMULATED_REQUIRE(address % 16 == 0 && barrier % 8 == 0);
  emulated::Cta* const to = emulated::self->cta->cluster->ctas[address >> emulated::kRankBit];
  uint32_t const within = (1u << emulated::kRankBit) - 1;
  emulated::sent.push_back({to, address & within, barrier & within, {a, b, c, d}});
}
inline void store_matrices(uint32_t address, uint32_t first, uint32_t second) {
  emulated::Warp& warp = *emulated::self->warp;
  int const lane = emulated::self->lane, row = lane % 8;
  warp.slot[lane][0] = first, warp.slot[lane][1] = second;
  emulated::sync_warp();
  if (lane < 16) {
    uint8_t* const to = shared_at(address, 16);
    for (int c = 0; c < 8; ++c) {
      uint16_t const v = warp.slot[c * 4 + row / 2][lane / 8] >> row % 2 * 16;
      std::memcpy(to + 2 * c, &v, 2);
    }
  }
  emulated::sync_warp();
}
inline void store_flag(uint32_t* flag, uint32_t value) { *flag = value, emulated::moved = true; }
inline uint32_t load_flag(uint32_t const* flag) { return *flag; }

// ---- FP8

inline float decode_fp8(uint8_t code, int mantissa, int bias, bool infinities) {
  int const exponent = (code & 127) >> mantissa, fraction = code & ((1 << mantissa) - 1);
  float v;
  if (infinities && exponent == 31)
    v = fraction ? NAN : INFINITY;
  else if (!infinities && (code & 127) == 127)
    v = NAN;
  else if (exponent == 0)
    v = std::ldexp(float(fraction), 1 - bias - mantissa);
  else
    v = std::ldexp(float(fraction + (1 << mantissa)), exponent - bias - mantissa);
  return code & 128 ? -v : v;
}
inline uint8_t encode_fp8(float v, int mantissa, int bias, float largest, uint8_t nan) {
  if (v != v) return nan;
  uint8_t const sign = std::signbit(v) ? 128 : 0;
  v = std::fmin(std::fabs(v), largest);
  int const exponent = std::max(v > 0 ? std::ilogb(v) : -1000, 1 - bias);
  int const steps = int(std::nearbyint(std::ldexp(v, mantissa - exponent)));
  return sign | uint8_t(steps + ((exponent + bias - 1) << mantissa));
}
inline uint16_t to_e5m2x2(float low, float high) {
  return encode_fp8(low, 2, 15, 57344, 0x7F) | encode_fp8(high, 2, 15, 57344, 0x7F) << 8;
}
inline uint8_t to_e4m3(float v) { return encode_fp8(v, 3, 7, 448, 0x7F); }

inline uint32_t permute(uint32_t low, uint32_t high, uint32_t select) {
  EMULATED_REQUIRE((select & 0x8888) == 0);
  return __byte_perm(low, high, select);
}
inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t v = 0;
  for (int half = 0; half < 32; half += 16) {
    float const x = __uint_as_float((a >> half) << 16), y = __uint_as_float((b >> half) << 16);
    v |= uint32_t(__float2bfloat16_rn(x * y).bits) << half;
  }
  return v;
}

// ---- barriers in shared memory, eight bytes as there

struct ClusterTransactionBarrier {
  int32_t bytes;
  uint8_t count, pending, phase, unused;

  void init(int arrivals) { bytes = 0, count = pending = uint8_t(arrivals), phase = 0; }
  void settle() {
    if (pending == 0 && bytes == 0) phase ^= 1, pending = count, emulated::moved = true;
  }
  void arrive() {
    EMULATED_REQUIRE(pending > 0);
    --pending, settle();
  }
  void arrive(int rank, uint32_t = 1) {
    uint32_t const at = cute::cast_smem_ptr_to_uint(this);
    uint8_t* const shared = emulated::self->cta->cluster->ctas[rank]->shared;
    reinterpret_cast<ClusterTransactionBarrier*>(shared + at)->arrive();
  }
  void arrive_and_expect_tx(int expected) {
    EMULATED_REQUIRE(pending > 0);
    bytes += expected, --pending, settle();
  }
  void complete(int copied) { bytes -= copied, settle(); }
  void wait(uint32_t parity) {
    emulated::wait_until(count == 1 ? "full" : "empty", [&] { return phase != parity; });
  }
};
using FullBarrier = ClusterTransactionBarrier;
using EmptyBarrier = ClusterTransactionBarrier;
static_assert(sizeof(FullBarrier) == 8);

inline void barrier_sync(int id, int threads) {
  emulated::rendezvous(emulated::self->cta->barriers[id], threads, "named barrier");
}
inline void barrier_arrive(int id, int threads) {
  emulated::meet(emulated::self->cta->barriers[id], threads);
}
inline bool barrier_any(int id, int threads, bool mine) {
  uint32_t& said = emulated::self->cta->said;  // a bit a barrier
  if (mine) said |= 1u << id;
  barrier_sync(id, threads);
  bool const any = said >> id & 1;
  barrier_sync(id, threads);
  said &= ~(1u << id);
  barrier_sync(id, threads);
  return any;
}

// ---- copies

inline uint64_t evict_first_policy() { return 0; }
inline uint64_t evict_last_policy() { return 0; }
inline uint64_t evict_normal_policy() { return 0; }
template <int Cluster = 1>
void bulk_copy(uint32_t smem, void const* gmem, uint32_t bytes, FullBarrier& full, uint64_t) {
  EMULATED_REQUIRE(smem % 16 == 0 && uintptr_t(gmem) % 16 == 0 && bytes % 16 == 0 && bytes > 0);
  EMULATED_REQUIRE(smem + bytes <= emulated::kSharedSize);
  emulated::copies.push_back({emulated::self->cta, smem, bytes,
                              cute::cast_smem_ptr_to_uint(&full), gmem, Cluster});
}
inline void prefetch(void const*) {}
inline void copy_async_16(uint32_t smem, void const* gmem) {
  emulated::self->async_copies.push_back({smem, gmem});
}
inline void wait_async_copies() {
  for (auto [smem, gmem] : emulated::self->async_copies) std::memcpy(shared_at(smem, 16), gmem, 16);
  emulated::self->async_copies.clear();
}

// ---- wgmma

template <class A, class B, int Tokens, int KElements>
struct Mma {
  static constexpr auto kA = A::kKind, kB = B::kKind;
  static constexpr int kTokens = Tokens;
  static_assert(KElements == (kA == emulated::Kind::kBf16 ? 16 : 32));
};
template <class Op, int N>
void mma(float (&d)[N], uint32_t const (&a)[4], uint64_t b,
         cute::SM90::GMMA::ScaleOut scale = cute::SM90::GMMA::ScaleOut::One) {
  static_assert(2 * N == Op::kTokens);
  emulated::Fiber& me = *emulated::self;
  std::memcpy(me.warp->slot[me.lane], a, sizeof a);
  emulated::sync_warp();
  emulated::Product p{d,     2 * N, me.group, Op::kA,
                      Op::kB, b,    scale == cute::SM90::GMMA::ScaleOut::Zero, {}};
  for (int t = 0; t < 4; ++t) {
    uint32_t const* const lane = me.warp->slot[me.lane / 4 * 4 + t];
    for (int half = 0; half < 2; ++half) {
      std::memcpy(&p.rows[0][16 * half + 4 * t], &lane[2 * half], 4);
      std::memcpy(&p.rows[1][16 * half + 4 * t], &lane[2 * half + 1], 4);
    }
  }
  emulated::sync_warp();
  me.products.push_back(p);
}

inline int unpack_row(emulated::Kind kind, uint8_t const* bytes, float (&v)[32]) {
  static float tables[2][256];
  if (tables[0][1] == 0) {
    for (int c = 0; c < 256; ++c) {
      tables[0][c] = decode_fp8(uint8_t(c), 2, 15, true);
      tables[1][c] = decode_fp8(uint8_t(c), 3, 7, false);
    }
  }
  if (kind == emulated::Kind::kBf16) {
    for (int i = 0; i < 16; ++i) {
      v[i] = __uint_as_float((uint32_t(bytes[2 * i]) | uint32_t(bytes[2 * i + 1]) << 8) << 16);
    }
    return 16;
  }
  float const* const table = tables[kind == emulated::Kind::kE4m3];
  for (int i = 0; i < 32; ++i) v[i] = table[bytes[i]];
  return 32;
}

inline void finish(emulated::Product const& p) {
  int const t = emulated::self->lane % 4, row_bytes = int(p.tile >> 32);
  float a[2][32], b[32];
  int const k = unpack_row(p.a, p.rows[0], a[0]);
  unpack_row(p.a, p.rows[1], a[1]);
  for (int j = 0; j < p.tokens / 8; ++j) {
    for (int c = 0; c < 2; ++c) {
      uint8_t bytes[32];
      for (int i = 0; i < 32; i += 16) {
        uint32_t at = uint32_t(p.tile & 0xFFFFFFFF) * 16 + (8 * j + 2 * t + c) * row_bytes + i;
        at ^= (at >> 7 & (row_bytes == 128 ? 7 : 3)) << 4;
        std::memcpy(bytes + i, shared_at(at, 16), 16);
      }
      unpack_row(p.b, bytes, b);
      for (int r = 0; r < 2; ++r) {
        double sum = 0;
        for (int i = 0; i < k; ++i) sum += double(a[r][i]) * b[i];
        float& d = p.d[4 * j + 2 * r + c];
        d = float(sum + (p.clear ? 0. : d));
      }
    }
  }
}
inline void finish_products(int groups_left) {
  auto& products = emulated::self->products;
  while (!products.empty() && products.front().group < emulated::self->group - groups_left) {
    finish(products.front());
    products.pop_front();
  }
}
template <int RowBytes>
uint64_t descriptor(uint32_t smem) {
  EMULATED_REQUIRE(smem % (8 * RowBytes) == 0);
  return uint64_t(RowBytes) << 32 | smem >> 4;
}
template <int N> void fence(float (&)[N]) {}

}  // namespace quantkit::sm90

#include "emulated_launch.cuh"
