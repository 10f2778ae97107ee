// Stands in for sm90_atoms.cuh on a CPU: one fiber a CUDA thread, so that the sm90 kernels run
// unchanged where there is no GPU. Speed, memory ordering and the rounding of FP8 sums are not
// modelled. What is asynchronous happens as late as it may: a wgmma when its wait returns, a bulk
// copy some turns after its issue. Reads of what was never written give NaN, a deadlock is an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define CUTLASS_DEVICE inline
#define CUTLASS_HOST_DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define EMULATED_REQUIRE(condition) emulated::require(condition, #condition)
namespace emulated {
inline void require(bool condition, char const* text);
}

// ---- CUDA's types

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };

template <class To, class From>
To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}
inline int __float_as_int(float v) { return bits_as<int>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(unsigned(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t const bits = bits_as<uint32_t>(v);
  if (v != v) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }
inline float __half2float(__half v) { return float(v.value); }
inline __half __float2half_rn(float v) { return {_Float16(v)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
inline __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return std::exp(v); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t select) {
  uint64_t const both = uint64_t(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}
template <class V> V __ldg(V const* at) { return *at; }
template <class V> V __ldcg(V const* at) { return *at; }
template <class V> void __stcg(V* at, V v) { *at = v; }
inline void __threadfence() {}

// ---- fibers

namespace emulated {

constexpr int kSharedSize = 1 << 18, kSharedOffset = 272;  // the kernel aligns what it gets
constexpr size_t kStack = 96 << 10;

struct Named { int arrived = 0; unsigned turn = 0; };
struct Cta;
struct Cluster { std::vector<Cta*> ctas; Named barrier; };
struct Warp {
  Named barrier;
  uint32_t slot[32][4];
};
struct Cta {
  dim3 index;
  Cluster* cluster = nullptr;
  int rank = 0, threads = 0;
  Named barriers[16];
  std::vector<Warp> warps;
  alignas(1024) uint8_t shared[kSharedSize];
};

enum class Kind { kE5m2, kE4m3, kBf16 };
struct Product {  // of a warp's 16 rows: this lane's rows g and g + 8, columns 2t and 2t + 1
  float* d;
  int tokens, group;
  Kind a, b;
  uint64_t tile;
  bool clear;
  uint8_t rows[2][32];
};
struct Fiber {
  ucontext_t start;
  jmp_buf context;
  std::unique_ptr<uint8_t[]> stack;
  Cta* cta;
  Warp* warp;
  dim3 index;
  int lane;
  bool started = false, done = false;
  char const* waits_for = "";
  unsigned cluster_turn = 0;
  int group = 0;  // wgmma groups committed
  std::deque<Product> products;
  std::vector<std::pair<uint32_t, void const*>> async_copies;
};
struct BulkCopy {
  Cta* from;
  uint32_t smem, bytes, barrier;
  void const* gmem;
  int cluster;
};

inline Fiber* self = nullptr;
inline jmp_buf scheduler;
inline bool moved = false;
inline std::function<void()> body;
inline std::vector<BulkCopy> copies;

inline char const* failed = nullptr;  // ends the launch
inline void require(bool condition, char const* text) {
  if (condition) return;
  failed = text;
  if (self) _longjmp(scheduler, 1);
}
inline void yield() {
  if (!_setjmp(self->context)) _longjmp(scheduler, 1);
}
template <class Condition>
void wait_until(char const* what, Condition condition) {
  self->waits_for = what;
  while (!condition()) yield();
  moved = true;
}
inline bool meet(Named& barrier, int threads) {  // whether this was the last to arrive
  if (++barrier.arrived < threads) return false;
  barrier.arrived = 0, ++barrier.turn, moved = true;
  return true;
}
inline void rendezvous(Named& barrier, int threads, char const* what) {
  unsigned const turn = barrier.turn;
  if (!meet(barrier, threads)) wait_until(what, [&] { return barrier.turn != turn; });
}
inline void sync_warp() { rendezvous(self->warp->barrier, 32, "warp"); }
template <class V>
V from_lane(V mine, int lane) {
  self->warp->slot[self->lane][0] = bits_as<uint32_t>(mine);
  sync_warp();
  V const v = bits_as<V>(self->warp->slot[lane & 31][0]);
  sync_warp();
  return v;
}

}  // namespace emulated

#define threadIdx (emulated::self->index)
#define blockIdx (emulated::self->cta->index)
inline dim3 gridDim, blockDim;

inline void __syncwarp() { emulated::sync_warp(); }
inline void __nanosleep(unsigned) { emulated::yield(); }
inline void __syncthreads() {
  emulated::Cta& cta = *emulated::self->cta;
  emulated::rendezvous(cta.barriers[0], cta.threads, "__syncthreads");
}
template <class V> V __shfl_sync(unsigned, V v, int lane) { return emulated::from_lane(v, lane); }
template <class V> V __shfl_xor_sync(unsigned, V v, int lanes) {
  return emulated::from_lane(v, emulated::self->lane ^ lanes);
}
inline int __reduce_max_sync(unsigned, int v) {
  for (int lanes = 1; lanes < 32; lanes *= 2) v = max(v, __shfl_xor_sync(~0u, v, lanes));
  return v;
}

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
inline uint32_t set_block_rank(uint32_t address, uint32_t) { return address; }
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

// ---- copies

inline uint64_t evict_first_policy() { return 0; }
inline uint64_t evict_last_policy() { return 0; }
template <int Cluster = 1>
void bulk_copy(uint32_t smem, void const* gmem, uint32_t bytes, FullBarrier& full, uint64_t) {
  EMULATED_REQUIRE(smem % 16 == 0 && uintptr_t(gmem) % 16 == 0 && bytes % 16 == 0 && bytes > 0);
  EMULATED_REQUIRE(smem + bytes <= emulated::kSharedSize);
  emulated::copies.push_back({emulated::self->cta, smem, bytes,
                              cute::cast_smem_ptr_to_uint(&full), gmem, Cluster});
}
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

// ---- launches

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchTimeout = 702,
  cudaErrorAssert = 710
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct { unsigned x, y, z; } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }

namespace emulated {

inline void run_fiber() {
  body();
  EMULATED_REQUIRE(self->products.empty());
  self->done = moved = true;
  _longjmp(scheduler, 1);
}
inline void resume(Fiber& fiber) {
  self = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}
inline void perform(BulkCopy const& copy) {
  for (int rank = 0; rank < copy.cluster; ++rank) {
    Cta& to = copy.cluster == 1 ? *copy.from : *copy.from->cluster->ctas[rank];
    std::memcpy(to.shared + copy.smem, copy.gmem, copy.bytes);
    using Barrier = quantkit::sm90::ClusterTransactionBarrier;
    reinterpret_cast<Barrier*>(to.shared + copy.barrier)->complete(int(copy.bytes));
  }
  moved = true;
}

// CTAs [first, first + count) of a grid that has one dimension, at the same time.
inline cudaError_t run_ctas(cudaLaunchConfig_t const& config, unsigned first, unsigned count,
                            unsigned cluster) {
  static std::mt19937 random(0);
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Fiber>> fibers;
  int const threads = int(config.blockDim.x);
  for (unsigned c = 0; c < count; ++c) {
    ctas.push_back(std::make_unique<Cta>());
    Cta& cta = *ctas.back();
    if (c % cluster == 0) clusters.push_back(std::make_unique<Cluster>());
    cta.index = dim3(first + c, 0, 0), cta.rank = int(c % cluster), cta.threads = threads;
    cta.cluster = clusters.back().get(), cta.cluster->ctas.push_back(&cta);
    cta.warps.resize(threads / 32);
    std::memset(cta.shared, 0xFF, sizeof cta.shared);
    for (int t = 0; t < threads; ++t) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers.back();
      fiber.cta = &cta, fiber.warp = &cta.warps[t / 32], fiber.lane = t % 32;
      fiber.index = dim3(unsigned(t), 0, 0), fiber.stack.reset(new uint8_t[kStack]);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get(), fiber.start.uc_stack.ss_size = kStack;
      makecontext(&fiber.start, run_fiber, 0);
    }
  }
  size_t live = fibers.size();
  while (live > 0 && !failed) {
    moved = false;
    size_t const turn = random() % fibers.size();
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = *fibers[(i + turn) % fibers.size()];
      if (fiber.done || failed) continue;
      resume(fiber);
      live -= fiber.done;
    }
    self = nullptr;
    for (size_t i = 0; i < copies.size();) {
      if (random() % 4) {
        ++i;
        continue;
      }
      BulkCopy const copy = copies[i];
      copies.erase(copies.begin() + long(i));
      perform(copy);
    }
    if (!moved && copies.empty()) {
      for (auto const& fiber : fibers) {
        if (!fiber->done && fiber->lane == 0) {
          std::fprintf(stderr, "emulator: deadlock, CTA %u thread %u waits for %s\n",
                       fiber->cta->index.x, fiber->index.x, fiber->waits_for);
        }
      }
      return cudaErrorLaunchTimeout;
    }
  }
  EMULATED_REQUIRE(copies.empty());
  if (!failed) return cudaSuccess;
  std::fprintf(stderr, "emulator: not so: %s\n", failed);
  failed = nullptr, copies.clear();
  return cudaErrorAssert;
}

}  // namespace emulated

template <class Kernel, class Args>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t const* config, Kernel kernel, Args const& args) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster = config->attrs[i].val.clusterDim.x;
      if (config->attrs[i].val.clusterDim.y != 1) return cudaErrorInvalidValue;
    }
  }
  if (config->gridDim.x % cluster) return cudaErrorInvalidValue;
  gridDim = config->gridDim, blockDim = config->blockDim;
  emulated::body = [kernel, &args] { kernel(args); };
  // Static shared memory is one for all here: such CTAs follow one another.
  unsigned const each = config->dynamicSmemBytes ? config->gridDim.x : 1;
  for (unsigned first = 0; first < config->gridDim.x; first += each) {
    cudaError_t const error = emulated::run_ctas(*config, first, each, cluster);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
