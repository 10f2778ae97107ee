// The main loop of the sm90 GEMM: what a warpgroup does with the bricks that the producer brings.
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
  // FP8 wgmma adds with about 14 bits: running sums go to FP32 registers now and then.
  static constexpr int kPromoteSteps = T::kPromoteColumns / (Format::kStepElements * 4 * kBricks);
  static_assert(kTurn * kBricks == 2 && kPromoteSteps % kTurn == 0);

  Arguments const& args;
  Shared<T> const& shared;
  int const row_group, k_group, thread, lane;
  Ring ring;
  int pending = -1;  // stage whose last wgmma may still run
  float sum[kTokens / 2];

  CUTLASS_DEVICE void release(int stage) {
    __syncwarp();
    if constexpr (T::kCluster == 1) {
      if (lane == 0) shared.empty[stage].arrive();
    } else {  // every CTA of the cluster writes into this one's stages
      if (lane < T::kCluster) shared.empty[stage].arrive(lane);
    }
  }

  CUTLASS_DEVICE void drain() {
    cute::warpgroup_wait<0>();
    if (pending >= 0) release(pending);
    pending = -1;
  }

  CUTLASS_DEVICE uint32_t weights(int stage, int brick, int brick_bytes = Format::kBytes) const {
    return shared.stage(stage) + T::kWeightsAt +
           ((row_group * T::kKGroups + k_group) * kBricks + brick) * brick_bytes;
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
        load_branch(a, weights(ring.stage, j, T::kBranchBytes), thread);
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
  static constexpr int kFlight = 64, kSpan = T::kLongSums ? 1 : 2;

  template <class Op, int Bricks, int Steps>
  CUTLASS_DEVICE void wide(uint32_t const (&a)[Bricks][Steps][4], uint64_t const (&b)[Bricks],
                           int token_stride, float4 const (&rows)[2], uint32_t factors) {
    constexpr int kFlights = T::kLongSums ? 1 : 2;  // in the air, as registers allow
    float flight[kFlights][kFlight / 2];
    auto land = [&](int h) {
      fence(flight[h % kFlights]);
#pragma unroll
      for (int i = 0; i < kFlight / 2; ++i) {
        float factor = 1.f;
        if (factors)
          factor = rows[i / 2 % 2].z *
                   __uint_as_float(load_shared_32(
                       factors + (h * kFlight + i / 4 * 8 + lane % 4 * 2 + i % 2) * 8 + 4));
        sum[h * (kFlight / 2) + i] += flight[h % kFlights][i] * factor;
      }
    };
#pragma unroll
    for (int h = 0; h < kTokens / kFlight; ++h) {
      cute::warpgroup_arrive();
#pragma unroll
      for (int i = 0; i < Bricks; ++i) {
#pragma unroll
        for (int s = 0; s < Steps; ++s) {
          mma<Op>(flight[h % kFlights], a[i][s], b[i] + 2 * s + h * kFlight * token_stride / 16,
                  i + s ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
        }
      }
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<kFlights - 1>();
      if (h >= kFlights - 1) land(h - kFlights + 1);
    }
    cute::warpgroup_wait<0>();
    if constexpr (kFlights > 1) land(kTokens / kFlight - 1);
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

  CUTLASS_DEVICE void multiply_wide(float4 const (&rows)[2], uint32_t scales) {
    static_assert(T::kStepBricks == 1);
    int step = 0;
    for (; step + kSpan <= args.bricks; step += kSpan) wide_span<kSpan>(rows);
    for (; step < args.bricks; ++step) wide_span<1>(rows);
    if constexpr (Branch::kPresent) wide_branch(rows, scales);
  }

  CUTLASS_DEVICE void wide_branch(float4 const (&rows)[2], uint32_t scales) {
    using Op =
        Mma<typename Branch::Element, typename Branch::Element, kFlight, Branch::kStepElements>;
    if constexpr (Branch::kScaled) {
      wait_async_copies();
      barrier_sync(kWarpgroupBarrier + row_group, 128);
    }
    for (int step = 0; step < args.branch_bricks; ++step) {
      shared.full[ring.stage].wait(ring.phase);
      uint32_t a[1][2][4];
      load_branch(a[0], weights(ring.stage, 0, T::kBranchBytes), thread);
      uint64_t const b[1] = {descriptor<64>(tokens(ring.stage, 0, T::kBranchTokenBrick))};
      wide<Op>(a, b, 64, rows, Branch::kScaled ? scales : 0);
      release(ring.stage);
      ring.advance<T::kStages>();
    }
  }

  // Prefill with long running sums: registers hold one set of sums, that of the tensor cores. FP8's
  // are narrow: where a small product meets a large sum, its last bits are lost. Numbers of like
  // size lose next to nothing however long their sum is; others go through a flight at a time.
  static constexpr int kAsk = 4;  // steps that every sum may take; by then the scales are here

  CUTLASS_DEVICE void multiply_long(float4 const (&rows)[2], uint32_t scales) {
    static_assert(T::kStepBricks == 1 && kAsk % 2 == 0);
    using Op = Mma<typename Format::Weight, typename Format::Token, kTokens, Format::kStepElements>;
    int step = 0, end = args.bricks & ~1;
    fence(sum);
    while (step < end) {
      whole_step<Op>(sum), whole_step<Op>(sum);
      step += 2;
      if constexpr (Format::kNarrowSum) {
        if (step == kAsk && far_apart(rows, scales)) end = step;
      }
    }
    drain();
    fence(sum);
    for (; step < args.bricks; ++step) wide_span<1>(rows);
    if constexpr (Branch::kScaled) {
      wide_branch(rows, scales);
    } else if constexpr (Branch::kPresent) {  // 16 bits lose nothing
      using BranchOp =
          Mma<typename Branch::Element, typename Branch::Element, kTokens, Branch::kStepElements>;
      fence(sum);
      for (int i = 0; i < args.branch_bricks; ++i) partial_step<BranchOp, true>(sum, 1);
      fence(sum);
    }
  }

 private:
  // Whether any row of this warpgroup, or token of the tile, has blocks of very different scales:
  // its own scale is negative then. A thread looks at its rows and at the tokens it copied.
  CUTLASS_DEVICE bool far_apart(float4 const (&rows)[2], uint32_t scales) const {
    wait_async_copies();
    int signs = __float_as_int(rows[0].x) | __float_as_int(rows[1].x);
    for (int i = thread; i < kTokens / 2; i += 128)
      signs |= load_shared_32(scales + i * 16) | load_shared_32(scales + i * 16 + 8);
    return barrier_any(kWarpgroupBarrier + row_group * T::kKGroups + k_group, 128, signs < 0);
  }
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

}  // namespace quantkit::sm90
