// How the sm90 GEMM is cut up and fed: tiles, the list of work, the producer warp, and the warps
// that hand partial sums from CTA to CTA.
#pragma once

#include <numeric>

#include "sm90_epilogue.cuh"
#include "sm90_formats.cuh"

namespace quantkit::sm90 {

template <class Format_, class Branch_, int Tokens_, int RowGroups_, int KGroups_, int Bricks_,
          int Stages_, int PromoteColumns_, int Cluster_, int Parts_>
struct Tile {
  using Format = Format_;
  using Branch = Branch_;
  static constexpr int kTokens = Tokens_, kRowGroups = RowGroups_, kKGroups = KGroups_;
  static constexpr int kBricks = Bricks_, kStages = Stages_;
  static constexpr int kPromoteColumns = PromoteColumns_, kCluster = Cluster_;
  // CTAs that share a tile: each takes a part of the steps, finishes some slices (a warpgroup's
  // share of the tokens of its row block), and sends sums of the others to the CTAs that do.
  static constexpr int kParts = Parts_;
  static constexpr int kSlices = kKGroups * 8 < kTokens ? kKGroups : kTokens / 8;
  static constexpr int kFinished = ceil_div(kRowGroups * kSlices, kParts);
  static constexpr int kCtas = kCluster * kParts;  // of a cluster
  static constexpr bool kPrefill = kTokens > 64;
  // Prefill whose running sums are as long as K where that loses nothing.
  static constexpr bool kLongSums = kPrefill && kPromoteColumns > 512;

  static constexpr int kWarpgroups = kRowGroups * kKGroups, kThreads = kWarpgroups * 128 + 128;
  // Multicast takes registers of the producer.
  static constexpr int kSpare = kCluster == 1 || (kWarpgroups == 4 && kTokens > 32) ? 0 : 32;
  static constexpr int kConsumerRegisters =
      (kWarpgroups == 4 ? 112 : kWarpgroups == 3 ? 160 : 240) - kSpare / kWarpgroups / 8 * 8;
  static constexpr int kOtherRegisters =
      (kWarpgroups == 2 ? 24 : 32) + kSpare / kWarpgroups / 8 * 8 * kWarpgroups;

  static constexpr int kStepBricks = kKGroups * kBricks;
  static constexpr int kTokenBrick = kTokens * 128, kBranchTokenBrick = kTokens * 64;
  static constexpr int kWeightsAt = kStepBricks * kTokenBrick;  // inside a stage
  static constexpr int kBranchBytes =
      Format::kBytes > kBranchBrick ? Format::kBytes : kBranchBrick;
  static constexpr int kLargestBrick = Branch::kPresent ? kBranchBytes : Format::kBytes;
  static constexpr int kStageBytes =
      (kWeightsAt + kRowGroups * kStepBricks * kLargestBrick + 1023) / 1024 * 1024;

  // After the stages: one epilogue area a row group, one set of token scales a warpgroup, sums that
  // other CTAs send, barriers.
  using Epilogue = TileEpilogue<kTokens, kKGroups>;
  using Slice = TileEpilogue<kTokens / kSlices, kKGroups>;
  static constexpr int kEpilogueAt = kStages * kStageBytes;
  static constexpr int kEpilogueBytes =  // slices are staged where their parts were
      kParts > 1 && kKGroups > 1 ? (kKGroups - 1) * Epilogue::kSumBytes : Epilogue::kBytes;
  static constexpr int kScalesAt = kEpilogueAt + kRowGroups * kEpilogueBytes;
  static constexpr int kReceivedAt = kScalesAt + kWarpgroups * kTokens * 8;
  static constexpr int kReceivedBytes = (kParts - 1) * Slice::kSumBytes;  // for a slice
  static constexpr int kBarriersAt = kReceivedAt + kFinished * kReceivedBytes;
  static constexpr int kBarriers = 2 * kStages + (kParts > 1 ? kFinished : 0);
  static constexpr int kSharedBytes = kBarriersAt + kBarriers * 8 + 1024;  // 1024: alignment
  static_assert(kParts == 1 || (kCluster == 1 && !kPrefill));
  static_assert(kSharedBytes <= 232448, "stages do not fit in shared memory");

  // All threads that may touch the barriers of this CTA: those of its cluster.
  CUTLASS_DEVICE static void sync() {
    if constexpr (kCtas > 1)
      cute::cluster_arrive_relaxed(), cute::cluster_wait();
    else
      __syncthreads();
  }
};

// Named barriers: 1.. one a warpgroup, 5.. the k groups of a row group have parts to add, 9.. those
// parts are read, 13 the partial sum of a split tile is written, 14 the partners' sums are there.
enum Barrier {
  kWarpgroupBarrier = 1,
  kPartsReady = 5,
  kPartsRead = 9,
  kPartial = 13,
  kPartners = 14
};

struct Segment {
  int row_tile, token_tile, begin, end;  // steps [begin, end) of a tile
};

// CTAs of a cluster work in step on row tiles that follow one another, with the same tokens: each
// fetches a part of those for all. What is handed out is the row tiles of a cluster. Where CTAs
// share tiles instead (kParts), a cluster has one tile and then ends.
template <class T>
struct Scheduler {
  int steps, position, end, clusters, tiles;
  bool split;

  CUTLASS_DEVICE Scheduler(Arguments const& args) {
    int const main = ceil_div(args.bricks, T::kStepBricks);
    steps = main + ceil_div(args.branch_bricks, T::kStepBricks);
    clusters = gridDim.x / T::kCtas, split = T::kParts == 1 && args.split;
    tiles = row_tiles(args) * args.token_tiles;
    position = split ? start_of(cluster()) : cluster();
    end = split ? start_of(cluster() + 1) : tiles;
  }

  CUTLASS_DEVICE static int row_tiles(Arguments const& args) {
    return ceil_div(args.row_tiles, T::kCluster);
  }
  CUTLASS_DEVICE static int cluster() { return blockIdx.x / T::kCtas; }
  CUTLASS_DEVICE static int rank() { return blockIdx.x % T::kCluster; }
  CUTLASS_DEVICE static int part() { return blockIdx.x % T::kParts; }
  CUTLASS_DEVICE static int cta_of(int cluster) { return cluster * T::kCluster + rank(); }
  CUTLASS_DEVICE int start_of(int cluster) const { return tiles * steps * cluster / clusters; }

  CUTLASS_DEVICE bool next(Arguments const& args, Segment& segment) {
    if (position >= end) return false;
    int tile = position;
    segment.begin = steps * part() / T::kParts;
    segment.end = steps * (part() + 1) / T::kParts;
    if (split) {
      tile = position / steps;
      segment.begin = position - tile * steps;
      segment.end = min(steps, segment.begin + end - position);
      position += segment.end - segment.begin;
    } else {
      position += clusters;
    }
    // Groups of eight token tiles share the weights that pass through L2.
    int const group = tile / (8 * row_tiles(args)), rest = tile - group * 8 * row_tiles(args);
    int const width = min(8, args.token_tiles - group * 8);
    segment.row_tile = rest / width;
    segment.token_tile = group * 8 + rest - segment.row_tile * width;
    segment.row_tile = cta_of(segment.row_tile);
    return true;
  }
};

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  template <int Stages>
  CUTLASS_DEVICE void advance() {
    if (++stage == Stages) stage = 0, phase ^= 1;
  }
};

template <class T>
struct Shared {
  uint32_t base;
  FullBarrier* full;
  EmptyBarrier* empty;
  FullBarrier* received;  // one a slice that this CTA finishes
  CUTLASS_DEVICE uint32_t stage(int s) const { return base + s * T::kStageBytes; }
};

// ---- producer: one thread copies the bricks of each step; tokens first, stages in order

// Passes [first_pass, passes): pass 0 fetches weights of the first stages, which no kernel writes,
// so that under programmatic launch the previous kernel may still run; everything else waits.
template <class T>
CUTLASS_DEVICE void produce(Arguments const& args, Shared<T> const& shared, int first_pass,
                            int passes) {
  // Weights pass once in decode; in prefill CTAs that have other tokens come for them soon after.
  uint64_t const stream = T::kPrefill ? evict_normal_policy() : evict_first_policy();
  uint64_t const keep = evict_last_policy();
  int const main = ceil_div(args.bricks, T::kStepBricks);
  // In units of which both kinds of bricks are multiples.
  constexpr int kUnit = std::gcd(T::Format::kBytes, T::kBranchBytes);
  int const main_units = args.bricks * (T::Format::kBytes / kUnit);
  int const row_stride = main_units + args.branch_bricks * (T::kBranchBytes / kUnit);
  int const ahead = min(args.ahead, T::kStages);
  for (int pass = ahead ? first_pass : max(first_pass, 1); pass < passes; ++pass) {
    if (pass == 1) cutlass::arch::wait_on_dependent_grids();
    Scheduler<T> scheduler(args);
    Ring ring;
    Segment work;
    int count = 0;
    while (scheduler.next(args, work)) {
      uint8_t const* tokens = args.tokens + work.token_tile * args.token_tile_bytes;
      int const row_block = work.row_tile * T::kRowGroups;
      int row_groups = min(T::kRowGroups, args.row_blocks - row_block);
      if constexpr (T::kCluster > 1) row_groups = max(row_groups, 0);
      for (int step = work.begin; step < work.end; ++step, ++count, ring.advance<T::kStages>()) {
        if (pass == 0 && count == ahead) break;
        bool const branch = step >= main;
        int const first = (branch ? step - main : step) * T::kStepBricks;
        int const bricks = min(T::kStepBricks, (branch ? args.branch_bricks : args.bricks) - first);
        int const token_brick = branch ? T::kBranchTokenBrick : T::kTokenBrick;
        int const brick = branch ? T::kBranchBytes : T::Format::kBytes;
        int const weight_bytes = bricks * brick, token_bytes = bricks * token_brick;
        FullBarrier& full = shared.full[ring.stage];
        bool const fetched = pass == 1 && count < ahead;  // its weights, by pass 0
        if (!fetched) {
          if (count >= T::kStages) shared.empty[ring.stage].wait(ring.phase ^ 1);
          full.arrive_and_expect_tx(row_groups * weight_bytes + token_bytes);
        }
        uint32_t const smem = shared.stage(ring.stage);
        if (pass == 1) {
          size_t const at =
              (branch ? size_t(args.bricks) * T::kTokenBrick : 0) + size_t(first) * token_brick;
          int const share = token_bytes / T::kCluster, from = Scheduler<T>::rank() * share;
          bulk_copy<T::kCluster>(smem + from, tokens + at + from, share, full, keep);
        }
        if (!fetched) {
          int const unit = (branch ? main_units : 0) + first * (brick / kUnit);
          uint8_t const* weights = args.weights + (size_t(row_block) * row_stride + unit) * kUnit;
          for (int r = 0; r < row_groups; ++r) {
            bulk_copy<1>(smem + T::kWeightsAt + r * T::kStepBricks * brick,
                         weights + size_t(r) * row_stride * kUnit, weight_bytes, full, stream);
          }
        }
      }
      if (pass == 0 && count == ahead) break;
    }
    if constexpr (T::kCluster > 1) {  // others arrive at this CTA's barriers until all is read
      if (pass == 0) continue;
      for (int s = 0; s < T::kStages; ++s, ring.advance<T::kStages>()) {
        shared.empty[ring.stage].wait(ring.phase ^ 1);
      }
    }
  }
}

// ---- helpers: a GPU-scope fence in a consumer warp would wait for all bulk copies in flight

template <class T>
CUTLASS_DEVICE void publish_partial(Arguments const& args) {
  Scheduler<T> const scheduler(args);
  if (scheduler.position % scheduler.steps == 0) return;  // this CTA starts with a whole tile
  barrier_sync(kPartial, T::kRowGroups * 128 + 32);
  if (threadIdx.x % 32 == 0) {
    __threadfence();
    store_flag(args.flags + blockIdx.x, 1);
  }
}

template <class T>
CUTLASS_DEVICE void collect_partials(Arguments const& args) {
  Scheduler<T> const scheduler(args);
  int const tile_start = scheduler.end / scheduler.steps * scheduler.steps;
  if (scheduler.end == tile_start || tile_start < scheduler.position) return;  // ends with a tile
  for (int q = scheduler.cluster() + 1 + threadIdx.x % 32;
       q < scheduler.clusters && scheduler.start_of(q) < tile_start + scheduler.steps; q += 32) {
    uint32_t* const flag = args.flags + scheduler.cta_of(q);
    while (!load_flag(flag)) __nanosleep(40);
    *flag = 0;  // ready for the next launch
  }
  __threadfence();
  __syncwarp();
  barrier_arrive(kPartners, T::kRowGroups * 128 + 32);
}

}  // namespace quantkit::sm90
