// CUDA's types, intrinsics and threads on a CPU (see emulated_atoms.cuh).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
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
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  auto one = [](__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    double const v = double(__bfloat162float(a)) * __bfloat162float(b) + __bfloat162float(c);
    return __float2bfloat16_rn(float(v));  // twice rounded, which only a tie in bfloat16 can show
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__float2bfloat16_rn(__bfloat162float(a.x) * __bfloat162float(b.x)),
          __float2bfloat16_rn(__bfloat162float(a.y) * __bfloat162float(b.y))};
}
inline __nv_bfloat162 __hadd2_rn(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__float2bfloat16_rn(__bfloat162float(a.x) + __bfloat162float(b.x)),
          __float2bfloat16_rn(__bfloat162float(a.y) + __bfloat162float(b.y))};
}
inline __nv_bfloat162 __hsub2_rn(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hadd2_rn(a, {{uint16_t(b.x.bits ^ 0x8000)}, {uint16_t(b.y.bits ^ 0x8000)}});
}
inline __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.f / v; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __expf(float v) { return std::exp(v); }
inline float __log2f(float v) { return std::log2(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
  uint32_t const low = std::max(a & 0xFFFF, b & 0xFFFF), high = std::max(a >> 16, b >> 16);
  return high << 16 | low;
}
inline uint32_t __vminu2(uint32_t a, uint32_t b) { return ~__vmaxu2(~a, ~b); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t select) {
  uint64_t const both = uint64_t(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}
inline uint32_t __dp2a_lo(uint32_t a, uint32_t b, uint32_t sum) {
  return sum + (a & 0xFFFF) * (b & 255) + (a >> 16) * (b >> 8 & 255);
}
template <class V> V __ldg(V const* at) { return *at; }
template <class V> V __ldcg(V const* at) { return *at; }
template <class V> void __stcg(V* at, V v) { *at = v; }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* at, unsigned v) { return std::exchange(*at, *at + v); }

// ---- fibers

namespace emulated {

constexpr int kRankBit = 18;  // of addresses in a cluster
constexpr int kSharedSize = 1 << kRankBit, kSharedOffset = 272;  // the kernel aligns what it gets
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
  int rank = 0, threads = 0, running = 0;
  uint32_t said = 0;
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

struct Sent {
  Cta* to;
  uint32_t smem, barrier;
  float v[4];
};

inline Fiber* self = nullptr;
inline jmp_buf scheduler;
inline bool moved = false;
inline std::function<void()> body;
inline std::vector<BulkCopy> copies;
inline std::vector<Sent> sent;

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
inline int __reduce_add_sync(unsigned, int v) {
  for (int lanes = 1; lanes < 32; lanes *= 2) v += __shfl_xor_sync(~0u, v, lanes);
  return v;
}

