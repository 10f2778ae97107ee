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
// results are the same on every run. Otherwise whole tiles, one after another.
#pragma once

#include "sm90_schedule.cuh"

namespace quantkit::sm90 {

template <class T>
struct Consumer {
  using Format = typename T::Format;
  using Branch = typename T::Branch;
  static constexpr int kTokens = T::kTokens, kBricks = T::kBricks;
  static constexpr int kTurn =
      2 / kBricks;  // steps a turn: two bricks, so that registers of A alternate
  // FP8 wgmma adds with about 14 bits: running sums go to FP32 registers every 512 columns.
  static constexpr int kPromoteSteps = 512 / (Format::kStepElements * 4 * kBricks);
  static_assert(kTurn * kBricks == 2 && kPromoteSteps % kTurn == 0);

  Arguments const& args;
  Shared<T> const& shared;
  int const row_group, k_group, thread, lane;
  Ring ring;
  int pending = -1;  // stage whose last wgmma may still run
  float sum[kTokens / 2];

  CUTLASS_DEVICE void release(int stage) {
    __syncwarp();
    if (lane == 0) shared.empty[stage].arrive();
  }

  CUTLASS_DEVICE void drain() {
    cute::warpgroup_wait<0>();
    if (pending >= 0) release(pending);
    pending = -1;
  }

  CUTLASS_DEVICE uint32_t weights(int stage, int brick) const {
    return shared.stage(stage) + T::kWeightsAt +
           ((row_group * T::kKGroups + k_group) * kBricks + brick) * Format::kBytes;
  }
  CUTLASS_DEVICE uint32_t tokens(int stage, int brick, int brick_bytes) const {
    return shared.stage(stage) + (k_group * kBricks + brick) * brick_bytes;
  }

  // Decodes the next brick while the tensor cores work on the one before.
  template <class Op>
  CUTLASS_DEVICE void whole_step(float (&acc)[kTokens / 2]) {
    shared.full[ring.stage].wait(ring.phase);
#pragma unroll
    for (int j = 0; j < kBricks; ++j) {
      uint32_t a[4][4];
      Format::decode(a, weights(ring.stage, j), thread);
      uint64_t const b = descriptor<128>(tokens(ring.stage, j, T::kTokenBrick));
      cute::warpgroup_arrive();
#pragma unroll
      for (int s = 0; s < 4; ++s) mma<Op>(acc, a[s], b + 2 * s);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      if (j == 0 && pending >= 0) release(pending);
    }
    pending = ring.stage;
    ring.advance<T::kStages>();
  }

  // A step of which this warpgroup has only `bricks`, main or branch, one after another.
  template <class Op, bool IsBranch>
  CUTLASS_DEVICE void partial_step(float (&acc)[kTokens / 2], int bricks) {
    shared.full[ring.stage].wait(ring.phase);
    for (int j = 0; j < bricks; ++j) {
      uint32_t a[IsBranch ? 2 : 4][4];
      uint64_t b;
      if constexpr (IsBranch) {
        load_branch(a, weights(ring.stage, j), thread);
        b = descriptor<64>(tokens(ring.stage, j, T::kBranchTokenBrick));
      } else {
        Format::decode(a, weights(ring.stage, j), thread);
        b = descriptor<128>(tokens(ring.stage, j, T::kTokenBrick));
      }
      cute::warpgroup_arrive();
#pragma unroll
      for (int s = 0; s < (IsBranch ? 2 : 4); ++s) mma<Op>(acc, a[s], b + 2 * s);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
    }
    release(ring.stage);
    ring.advance<T::kStages>();
  }

  CUTLASS_DEVICE static int share(int bricks, int step, int k_group) {  // of this warpgroup
    return max(0, min(kBricks, bricks - (step * T::kKGroups + k_group) * kBricks));
  }

  // sum += W X over the steps of a segment.
  CUTLASS_DEVICE void multiply(Segment const& work, float4 const (&rows)[2], uint32_t scales) {
    using Op = Mma<typename Format::Weight, typename Format::Token, kTokens, Format::kStepElements>;
    float acc[kTokens / 2];
    int const main = ceil_div(args.bricks, T::kStepBricks), main_end = min(work.end, main);
    // Steps whose bricks are all there for this warpgroup.
    int const whole = (args.bricks + (T::kKGroups - k_group - 1) * kBricks) / T::kStepBricks;
    int const whole_end = min(work.end, whole);
    int step = work.begin;
    clear(acc);
    for (int run = 0; step + kTurn <= whole_end; step += kTurn) {
#pragma unroll
      for (int i = 0; i < kTurn; ++i) whole_step<Op>(acc);
      if constexpr (Format::kNarrowSum) {
        if ((run += kTurn) == kPromoteSteps) promote(acc), run = 0;
      }
    }
    drain();
    for (; step < main_end; ++step) partial_step<Op, false>(acc, share(args.bricks, step, k_group));
    if constexpr (Branch::kPresent) {
      using BranchOp =
          Mma<typename Branch::Element, typename Branch::Element, kTokens, Branch::kStepElements>;
      if constexpr (Branch::kScaled) promote(acc);
      for (; step < work.end; ++step)
        partial_step<BranchOp, true>(acc, share(args.branch_bricks, step - main, k_group));
      if constexpr (Branch::kScaled) {
        wait_async_copies();
        barrier_sync(kWarpgroupBarrier + row_group * T::kKGroups + k_group, 128);
        fence(acc);
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) {
          uint32_t const factor =
              load_shared_32(scales + (i / 4 * 8 + lane % 4 * 2 + i % 2) * 8 + 4);
          sum[i] += acc[i] * (rows[i / 2 % 2].z * __uint_as_float(factor));
        }
        return;
      }
    }
    add(acc);
  }

  // Prefill: kFlight tokens at a time go through the bricks of a span and then into the sums, so
  // that no running sum is longer than a span and the decoded weights serve all tokens of the tile.
  static constexpr int kFlight = 64, kSpan = 2;

  template <class Op, int Bricks, int Steps>
  CUTLASS_DEVICE void wide(uint32_t const (&a)[Bricks][Steps][4], uint64_t const (&b)[Bricks],
                           int token_stride, float4 const (&rows)[2], uint32_t factors) {
    float flight[2][kFlight / 2];
    auto land = [&](int h) {
      fence(flight[h % 2]);
#pragma unroll
      for (int i = 0; i < kFlight / 2; ++i) {
        float factor = 1.f;
        if (factors)
          factor = rows[i / 2 % 2].z *
                   __uint_as_float(load_shared_32(
                       factors + (h * kFlight + i / 4 * 8 + lane % 4 * 2 + i % 2) * 8 + 4));
        sum[h * (kFlight / 2) + i] += flight[h % 2][i] * factor;
      }
    };
#pragma unroll
    for (int h = 0; h < kTokens / kFlight; ++h) {
      cute::warpgroup_arrive();
#pragma unroll
      for (int i = 0; i < Bricks; ++i) {
#pragma unroll
        for (int s = 0; s < Steps; ++s) {
          mma<Op>(flight[h % 2], a[i][s], b[i] + 2 * s + h * kFlight * token_stride / 16,
                  i + s ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
        }
      }
      cute::warpgroup_commit_batch();
      if (h > 0) cute::warpgroup_wait<1>(), land(h - 1);
    }
    cute::warpgroup_wait<0>();
    land(kTokens / kFlight - 1);
  }

  template <int Span>
  CUTLASS_DEVICE void wide_span(float4 const (&rows)[2]) {
    using Op = Mma<typename Format::Weight, typename Format::Token, kFlight, Format::kStepElements>;
    uint32_t a[Span][4][4];
    uint64_t b[Span];
    int stages[Span];
#pragma unroll
    for (int i = 0; i < Span; ++i) {
      shared.full[ring.stage].wait(ring.phase);
      Format::decode(a[i], weights(ring.stage, 0), thread);
      b[i] = descriptor<128>(tokens(ring.stage, 0, T::kTokenBrick));
      stages[i] = ring.stage;
      ring.advance<T::kStages>();
    }
    wide<Op>(a, b, 128, rows, 0);
#pragma unroll
    for (int i = 0; i < Span; ++i) release(stages[i]);
  }

  CUTLASS_DEVICE void multiply_wide(Segment const& work, float4 const (&rows)[2], uint32_t scales) {
    static_assert(T::kStepBricks == 1);
    int step = 0;
    for (; step + kSpan <= args.bricks; step += kSpan) wide_span<kSpan>(rows);
    for (; step < args.bricks; ++step) wide_span<1>(rows);
    if constexpr (Branch::kPresent) {
      using Op =
          Mma<typename Branch::Element, typename Branch::Element, kFlight, Branch::kStepElements>;
      if constexpr (Branch::kScaled) {
        wait_async_copies();
        barrier_sync(kWarpgroupBarrier + row_group, 128);
      }
      for (; step < work.end; ++step) {
        shared.full[ring.stage].wait(ring.phase);
        uint32_t a[1][2][4];
        load_branch(a[0], weights(ring.stage, 0), thread);
        uint64_t const b[1] = {descriptor<64>(tokens(ring.stage, 0, T::kBranchTokenBrick))};
        wide<Op>(a, b, 64, rows, Branch::kScaled ? scales : 0);
        release(ring.stage);
        ring.advance<T::kStages>();
      }
    }
  }

 private:
  CUTLASS_DEVICE static void clear(float (&acc)[kTokens / 2]) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.f;
  }
  CUTLASS_DEVICE void add(float (&acc)[kTokens / 2]) {
    fence(acc);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sum[i] += acc[i];
  }
  CUTLASS_DEVICE void promote(float (&acc)[kTokens / 2]) {
    drain();
    add(acc);
    clear(acc);
  }
};

template <class T>
CUTLASS_DEVICE void consume(Arguments const& args, Shared<T> const& shared, int warpgroup) {
  using Epilogue = typename T::Epilogue;
  constexpr int kKGroups = T::kKGroups, kRowThreads = T::kRowGroups * 128 + 32;
  int const thread = threadIdx.x % 128, lane = thread % 32;
  int const row_group = warpgroup / kKGroups, k_group = warpgroup % kKGroups;
  Consumer<T> consumer{args, shared, row_group, k_group, thread, lane};
  auto& sum = consumer.sum;
  uint32_t const area = shared.base + T::kEpilogueAt + row_group * Epilogue::kBytes;
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
    bool partners = !T::kPrefill && work.begin == 0 && work.end < scheduler.steps && k_group == 0;
    if (partners && scheduler.end - start >= scheduler.steps + 3) {
      // The one partial sum that this tile needs was written long ago: start from it.
      barrier_sync(kPartners, kRowThreads);
      Epilogue::add_partial(
          Epilogue::partial(args, blockIdx.x + 1, T::kRowGroups, row_group, thread), sum);
      partners = false;
    }

    if constexpr (T::kPrefill)
      consumer.multiply_wide(work, rows, scales);
    else
      consumer.multiply(work, rows, scales);

    if constexpr (kKGroups > 1) {
      if (k_group > 0) {
        if (count) barrier_sync(kPartsRead + row_group, kKGroups * 128);
        Epilogue::write_part(area, k_group - 1, sum, thread);
        barrier_arrive(kPartsReady + row_group, kKGroups * 128);
        continue;
      }
      barrier_sync(kPartsReady + row_group, kKGroups * 128);
      Epilogue::add_parts(area, sum, thread);
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
        for (int q = blockIdx.x + 1; q < scheduler.ctas && scheduler.start_of(q) < tile_end; ++q) {
          Epilogue::add_partial(Epilogue::partial(args, q, T::kRowGroups, row_group, thread), sum);
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
                         reinterpret_cast<EmptyBarrier*>(full + T::kStages)};
  if (threadIdx.x == 0) {
    for (int s = 0; s < T::kStages; ++s)
      shared.full[s].init(1), shared.empty[s].init(T::kWarpgroups * 4);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  int const warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp < T::kWarpgroups * 4) {
    cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    cutlass::arch::wait_on_dependent_grids();
    consume<T>(args, shared, warp / 4);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<T::kOtherRegisters>();
    int const role = warp - T::kWarpgroups * 4;
    if (role == 0) {
      if (threadIdx.x % 32 == 0) produce<T>(args, shared);
    } else if (!T::kPrefill && args.split && role < 3) {
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
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = overlap;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = T::kThreads, config.dynamicSmemBytes = T::kSharedBytes;
  config.stream = stream, config.attrs = &attribute, config.numAttrs = overlap ? 1 : 0;
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
