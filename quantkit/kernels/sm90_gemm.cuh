// D[token, row] = scale_row * scale_token * sum_k W[row, k] X[token, k] + bias on Hopper.
//
// W is wgmma's A operand: 4- or 8-bit in memory, decoded in registers (sm90_formats.cuh). X is B,
// written swizzled by sm90_activation.cuh. 64 rows are one warpgroup's M, the tokens are N.
//
// A CTA is RowGroups x KGroups consumer warpgroups, a producer warp and two helper warps. A *step*
// is one pipeline stage: KGroups * Bricks bricks along K for each of RowGroups 64-row blocks.
// Warpgroups of one row block take different bricks of a step (KGroups) and add up at the end.
//
// Work is a list of (tile, step). Split schedule (stream-K): CTA c takes the c-th part of the list;
// the CTA that starts a tile finishes it, adding the partial sums of the CTAs after it in order, so
// results are the same on every run. Otherwise whole tiles, one after another; or a tile a cluster,
// whose CTAs (Parts) take a part of its steps each and send one another the sums of row groups.
#pragma once

#include "sm90_mainloop.cuh"

namespace quantkit::sm90 {

// Tiles in parts. The warpgroups of a row block share its tokens: each adds up a slice of them and
// sends it to the CTA that finishes it, or adds what other CTAs send and stores the sum.
template <class T>
CUTLASS_DEVICE void finish_part(Consumer<T>& consumer, Segment const& work,
                                float4 const (&rows)[2], uint32_t scales, int warpgroup) {
  using Slice = typename T::Slice;
  constexpr int kKGroups = T::kKGroups, kSlices = T::kSlices, kSums = Slice::kSums;
  Arguments const& args = consumer.args;
  Shared<T> const& shared = consumer.shared;
  int const thread = consumer.thread, row_group = consumer.row_group, k_group = consumer.k_group;
  uint32_t const area = shared.base + T::kEpilogueAt + row_group * T::kEpilogueBytes;
  auto part_at = [&](int slice, int part) {
    return area + (slice * (kKGroups - 1) + part) * Slice::kSumBytes;
  };
  float sum[kSums];
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    float slice[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) slice[i] = consumer.sum[s * kSums + i];
    if (s != k_group) {
      Slice::write(part_at(s, k_group - (k_group > s)), slice, thread);
    } else {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] = slice[i];
    }
  }
  if constexpr (kKGroups > 1) {
    if (k_group >= kSlices) {
      barrier_arrive(kPartsReady + row_group, kKGroups * 128);
      return;
    }
    barrier_sync(kPartsReady + row_group, kKGroups * 128);
#pragma unroll
    for (int i = 0; i < kKGroups - 1; ++i) Slice::add(part_at(k_group, i), sum, thread);
  }

  int const unit = row_group * kSlices + k_group, part = Scheduler<T>::part();
  int const finisher = unit % T::kParts, slot = unit / T::kParts;
  uint32_t const received = shared.base + T::kReceivedAt + slot * T::kReceivedBytes;
  FullBarrier& barrier = shared.received[slot];
  if (part != finisher) {
    uint32_t const at = received + (part - (part > finisher)) * Slice::kSumBytes;
    uint32_t const counts = cute::cast_smem_ptr_to_uint(&barrier);
    Slice::send(cute::set_block_rank(at, finisher), cute::set_block_rank(counts, finisher), sum,
                thread);
    return;
  }
  barrier.wait(0);  // nobody writes here after that: this CTA may end before the others
#pragma unroll
  for (int i = 0; i < T::kParts - 1; ++i) Slice::add(received + i * Slice::kSumBytes, sum, thread);
  wait_async_copies();
  barrier_sync(kWarpgroupBarrier + warpgroup, 128);
  int const row_block = work.row_tile * T::kRowGroups + row_group;
  int const token = k_group * Slice::kTokens;
  if (row_block < args.row_blocks) {
    Slice::store(args, sum, rows, scales + token * 8, kKGroups > 1 ? part_at(k_group, 0) : area,
                 row_block * 64, work.token_tile * T::kTokens + token, thread,
                 kWarpgroupBarrier + warpgroup);
  }
}

template <class T>
CUTLASS_DEVICE void consume(Arguments const& args, Shared<T> const& shared, int warpgroup) {
  using Epilogue = typename T::Epilogue;
  constexpr int kKGroups = T::kKGroups, kRowThreads = T::kRowGroups * 128 + 32;
  int const thread = threadIdx.x % 128, lane = thread % 32;
  int const row_group = warpgroup / kKGroups, k_group = warpgroup % kKGroups;
  Consumer<T> consumer{args, shared, row_group, k_group, thread, lane};
  auto& sum = consumer.sum;
  uint32_t const area = shared.base + T::kEpilogueAt + row_group * T::kEpilogueBytes;
  uint32_t const parts = area + Epilogue::kPartsAt;
  uint32_t const scales = shared.base + T::kScalesAt + warpgroup * T::kTokens * 8;
  Scheduler<T> scheduler(args);
  int const start = scheduler.position;
  Segment work;
  for (int count = 0; scheduler.next(args, work); ++count) {
    // Scales, long before the epilogue needs them.
    int const row_block = work.row_tile * T::kRowGroups + row_group;
    float4 const* const row =
        args.rows + min(row_block, args.row_blocks - 1) * 64 + thread / 32 * 16 + lane / 4;
    float4 const rows[2] = {row[0], row[8]};
    for (int i = thread; i < T::kTokens / 2; i += 128) {
      copy_async_16(scales + i * 16, args.token_scales + work.token_tile * T::kTokens + i * 2);
    }
#pragma unroll
    for (int i = 0; i < T::kTokens / 2; ++i) sum[i] = 0.f;
    bool partners = !T::kPrefill && T::kParts == 1 && work.begin == 0 &&
                    work.end < scheduler.steps && k_group == 0;
    if (partners && scheduler.end - start >= scheduler.steps + 3) {
      // The one partial sum that this tile needs was written long ago: start from it.
      barrier_sync(kPartners, kRowThreads);
      Epilogue::add_partial(
          Epilogue::partial(args, blockIdx.x + T::kCluster, T::kRowGroups, row_group, thread), sum);
      partners = false;
    }

    if constexpr (T::kLongSums)
      consumer.multiply_long(rows, scales);
    else if constexpr (T::kPrefill)
      consumer.multiply_wide(rows, scales);
    else
      consumer.multiply(work, rows, scales);

    if constexpr (T::kParts > 1) {
      finish_part(consumer, work, rows, scales, warpgroup);
      continue;
    }
    if constexpr (kKGroups > 1) {
      if (k_group > 0) {
        if (count) barrier_sync(kPartsRead + row_group, kKGroups * 128);
        Epilogue::write(parts + (k_group - 1) * Epilogue::kSumBytes, sum, thread);
        barrier_arrive(kPartsReady + row_group, kKGroups * 128);
        continue;
      }
      barrier_sync(kPartsReady + row_group, kKGroups * 128);
#pragma unroll
      for (int i = 0; i < kKGroups - 1; ++i)
        Epilogue::add(parts + i * Epilogue::kSumBytes, sum, thread);
      if (scheduler.position < scheduler.end)
        barrier_arrive(kPartsRead + row_group, kKGroups * 128);
    }
    if constexpr (!T::kPrefill) {
      if (work.begin > 0) {
        Epilogue::write_partial(
            Epilogue::partial(args, blockIdx.x, T::kRowGroups, row_group, thread), sum);
        barrier_arrive(kPartial, kRowThreads);
        continue;
      }
      if (partners) {
        int const tile_end = (scheduler.end / scheduler.steps + 1) * scheduler.steps;
        barrier_sync(kPartners, kRowThreads);
        for (int q = scheduler.cluster() + 1;
             q < scheduler.clusters && scheduler.start_of(q) < tile_end; ++q) {
          Epilogue::add_partial(
              Epilogue::partial(args, scheduler.cta_of(q), T::kRowGroups, row_group, thread), sum);
        }
      }
    }
    wait_async_copies();
    barrier_sync(kWarpgroupBarrier + warpgroup, 128);
    if (row_block < args.row_blocks) {
      Epilogue::store(args, sum, rows, scales, area, row_block * 64, work.token_tile * T::kTokens,
                      thread, kWarpgroupBarrier + warpgroup);
    }
    barrier_sync(kWarpgroupBarrier + warpgroup,
                 128);  // the scales and the staging area are free again
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) gemm(__grid_constant__ Arguments const args) {
  uint8_t* const raw = dynamic_shared();
  uint8_t* const aligned = raw + (-cute::cast_smem_ptr_to_uint(raw) & 1023);
  FullBarrier* const full = reinterpret_cast<FullBarrier*>(aligned + T::kBarriersAt);
  Shared<T> const shared{cute::cast_smem_ptr_to_uint(aligned), full,
                         reinterpret_cast<EmptyBarrier*>(full + T::kStages),
                         full + 2 * T::kStages};
  int const warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == T::kWarpgroups * 128) {  // the producer: the first weights come meanwhile
    for (int s = 0; s < T::kStages; ++s)
      shared.full[s].init(1), shared.empty[s].init(T::kWarpgroups * 4 * T::kCluster);
    if constexpr (T::kParts > 1) {
      for (int i = 0; i < T::kFinished; ++i) shared.received[i].init(1);
    }
    cutlass::arch::fence_barrier_init();
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::launch_dependent_grids();
    produce<T>(args, shared, 0, 1);
    if constexpr (T::kParts > 1) {
      for (int i = 0; i < T::kFinished; ++i)
        shared.received[i].arrive_and_expect_tx(T::kReceivedBytes);
    }
  }
  __syncwarp();
  T::sync();
  if (warp < T::kWarpgroups * 4) {
    cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    cutlass::arch::wait_on_dependent_grids();
    consume<T>(args, shared, warp / 4);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<T::kOtherRegisters>();
    int const role = warp - T::kWarpgroups * 4;
    if (role == 0) {
      if (threadIdx.x % 32 == 0) produce<T>(args, shared, 1, 2);
    } else if (!T::kPrefill && T::kParts == 1 && args.split && role < 3) {
      cutlass::arch::wait_on_dependent_grids();
      if (role == 1)
        publish_partial<T>(args);
      else
        collect_partials<T>(args);
    }
  }
}

template <class T>
int launch(Arguments const& args, int grid, int overlap, cudaStream_t stream) {
  static std::atomic<uint64_t> ready{0};  // devices on which the kernel may use its shared memory
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && !(ready.load() >> device & 1)) {
    error =
        cudaFuncSetAttribute(gemm<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
    if (error == cudaSuccess) ready |= uint64_t(1) << device;
  }
  if (error != cudaSuccess) return error;
  if (T::kParts > 1 && (args.split || grid != args.row_tiles * args.token_tiles * T::kParts))
    return cudaErrorInvalidValue;  // a cluster takes one tile
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (T::kCtas > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {T::kCtas, 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = T::kThreads, config.dynamicSmemBytes = T::kSharedBytes;
  config.stream = stream, config.attrs = attributes, config.numAttrs = count;
  return cudaLaunchKernelEx(&config, gemm<T>, args);
}

}  // namespace quantkit::sm90

// One line instantiates a kernel: the entry point, then the parameters of Tile.
#define QUANTKIT_SM90_GEMM(NAME, ...)                                                          \
  extern "C" int NAME(quantkit::sm90::Arguments const* args, int grid, int overlap,            \
                      void* stream) {                                                          \
    using namespace quantkit::sm90;                                                            \
    return launch<Tile<__VA_ARGS__>>(*args, grid, overlap, static_cast<cudaStream_t>(stream)); \
  }
