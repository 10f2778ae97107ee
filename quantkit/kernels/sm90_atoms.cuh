// Hopper building blocks: the CUTLASS and CuTe parts that the sm90 kernels use, and the few
// instructions for which those headers have no wrapper.
#pragma once

#define CUTLASS_ENABLE_GDC_FOR_SM90 1

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

#include <atomic>
#include <cstdint>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/util.hpp>
#include <utility>

namespace quantkit::sm90 {

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

CUTLASS_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- shared memory by 32-bit address: volatile, so that no load moves across a barrier wait

CUTLASS_DEVICE uint4 load_shared_128(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

CUTLASS_DEVICE uint2 load_shared_64(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

CUTLASS_DEVICE uint32_t load_shared_32(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

CUTLASS_DEVICE void store_shared_128(uint32_t address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}

// 32 bits of another CTA of the cluster; the address is cute::set_block_rank's.
CUTLASS_DEVICE int load_cluster_32(uint32_t address) {
  int v;
  asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// 16 bytes to another CTA of the cluster, whose barrier counts them: both addresses are
// cute::set_block_rank's. No fence, and nothing waits for it here.
CUTLASS_DEVICE void send_128(uint32_t address, uint32_t barrier, float a, float b, float c,
                             float d) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
      ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier)
      : "memory");
}

// Two 8x8 matrices of 16 bits, transposed on their way to shared memory.
CUTLASS_DEVICE void store_matrices(uint32_t address, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.x2.trans.m8n8.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(first), "r"(second)
               : "memory");
}

CUTLASS_DEVICE uint8_t* dynamic_shared() {
  extern __shared__ uint8_t raw[];
  return raw;
}

// ---- flags in global memory; what they guard is ordered by fences

CUTLASS_DEVICE void store_flag(uint32_t* flag, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

CUTLASS_DEVICE uint32_t load_flag(uint32_t const* flag) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
  return v;
}

// ---- 16- and 8-bit numbers

// PRMT of a selector whose lower half has bits 0-2 of each nibble only (__byte_perm would mask it).
CUTLASS_DEVICE uint32_t permute(uint32_t low, uint32_t high, uint32_t select) {
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(low), "r"(high), "r"(select));
  return v;
}

// Two products of bfloat16; subnormals count.
CUTLASS_DEVICE uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t v;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
  return v;
}

CUTLASS_DEVICE uint16_t to_e5m2x2(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

CUTLASS_DEVICE uint8_t to_e4m3(float v) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.f), "f"(v));
  return uint8_t(pair);
}

// ---- copies

CUTLASS_DEVICE uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

CUTLASS_DEVICE uint64_t evict_last_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

CUTLASS_DEVICE uint64_t evict_normal_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// cute::SM90_BULK_COPY_G2S with an L2 cache policy, to the same place in all CTAs of the cluster.
template <int Cluster>
CUTLASS_DEVICE void bulk_copy(uint32_t smem, void const* gmem, uint32_t bytes, FullBarrier& full,
                              uint64_t policy) {
  uint32_t const barrier = cute::cast_smem_ptr_to_uint(&full);
  if constexpr (Cluster == 1) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1], %2, [%3], %4;" ::"r"(smem),
        "l"(gmem), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        ".L2::cache_hint [%0], [%1], %2, [%3], %4, %5;" ::"r"(smem),
        "l"(gmem), "r"(bytes), "r"(barrier), "h"(uint16_t((1 << Cluster) - 1)), "l"(policy)
        : "memory");
  }
}

CUTLASS_DEVICE void prefetch(void const* gmem) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(gmem));
}

CUTLASS_DEVICE void copy_async_16(uint32_t smem, void const* gmem) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(gmem) : "memory");
}

CUTLASS_DEVICE void wait_async_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- named barriers by hardware number (CUTLASS keeps the first eight numbers for itself; its
// collectives are not used in these kernels, so all but barrier 0 are free)

CUTLASS_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

CUTLASS_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

CUTLASS_DEVICE bool barrier_any(int id, int threads, bool mine) {  // of the threads' `mine`
  int any;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.s32 p, %3, 0;\nbar.red.or.pred q, %1, %2, p;\n"
      "selp.s32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(int(mine))
      : "memory");
  return any;
}

// ---- wgmma with A from registers

template <class A, class B, int Tokens, int KElements>
using Mma = decltype(cute::SM90::GMMA::rs_op_selector<
                     A, B, float, cute::Shape<cute::_64, cute::Int<Tokens>, cute::Int<KElements>>,
                     cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>());

template <class Op, int N, std::size_t... I>
CUTLASS_DEVICE void mma(float (&d)[N], uint32_t const (&a)[4], uint64_t b,
                        cute::SM90::GMMA::ScaleOut scale, std::index_sequence<I...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, d[I]..., scale);
}

// d (+)= a * b: d is the 64 x 2N fragment of this warpgroup, b the descriptor of 2N tokens.
template <class Op, int N>
CUTLASS_DEVICE void mma(float (&d)[N], uint32_t const (&a)[4], uint64_t b,
                        cute::SM90::GMMA::ScaleOut scale = cute::SM90::GMMA::ScaleOut::One) {
  mma<Op>(d, a, b, scale, std::make_index_sequence<N>{});
}

// K-major tile of 8-token atoms whose rows are `RowBytes` (128 or 64) under the swizzle of that
// width. Adding 2 to it moves 32 bytes along K.
template <int RowBytes>
CUTLASS_DEVICE uint64_t descriptor(uint32_t smem) {
  static_assert(RowBytes == 128 || RowBytes == 64);
  cute::GmmaDescriptor d;
  d.bitfield.start_address_ = smem >> 4;
  d.bitfield.leading_byte_offset_ = 1;
  d.bitfield.stride_byte_offset_ = 8 * RowBytes >> 4;
  d.bitfield.layout_type_ = static_cast<uint8_t>(
      RowBytes == 128 ? cute::SM90::GMMA::LayoutType::B128 : cute::SM90::GMMA::LayoutType::B64);
  return d;
}

// Keeps reads of the accumulators below the wait that makes them valid.
template <int N>
CUTLASS_DEVICE void fence(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(d[i]);
}

}  // namespace quantkit::sm90
