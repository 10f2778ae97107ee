// How the sm90 GEMM is cut up and fed: tiles, the list of work, the producer warp, and the warps
// that hand partial sums from CTA to CTA.
#pragma once

#include "sm90_epilogue.cuh"
#include "sm90_formats.cuh"

namespace quantkit::sm90 {

template <class Format_, class Branch_, int Tokens_, int RowGroups_, int KGroups_, int Bricks_,
          int Stages_>
struct Tile {
  using Format = Format_;
  using Branch = Branch_;
  static constexpr int kTokens = Tokens_, kRowGroups = RowGroups_, kKGroups = KGroups_;
  static constexpr int kBricks = Bricks_, kStages = Stages_;
  static constexpr bool kPrefill = kTokens > 64;

  static constexpr int kWarpgroups = kRowGroups * kKGroups, kThreads = kWarpgroups * 128 + 128;
  static constexpr int kConsumerRegisters = kWarpgroups == 4 ? 112 : kWarpgroups == 3 ? 160 : 240;
  static constexpr int kOtherRegisters = kWarpgroups == 2 ? 24 : 32;

  static constexpr int kStepBricks = kKGroups * kBricks;
  static constexpr int kTokenBrick = kTokens * 128, kBranchTokenBrick = kTokens * 64;
  static constexpr int kWeightsAt = kStepBricks * kTokenBrick;  // inside a stage
  static constexpr int kStageBytes =
      (kWeightsAt + kRowGroups * kStepBricks * Format::kBytes + 1023) / 1024 * 1024;

  // After the stages: one epilogue area a row group, one set of token scales a warpgroup, barriers.
  using Epilogue = TileEpilogue<kTokens, kKGroups>;
  static constexpr int kEpilogueAt = kStages * kStageBytes;
  static constexpr int kScalesAt = kEpilogueAt + kRowGroups * Epilogue::kBytes;
  static constexpr int kBarriersAt = kScalesAt + kWarpgroups * kTokens * 8;
  static constexpr int kSharedBytes = kBarriersAt + kStages * 16 + 1024;  // 1024: alignment
  static_assert(kSharedBytes <= 232448, "stages do not fit in shared memory");
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

template <class T>
struct Scheduler {
  int steps, position, end, ctas, tiles;
  bool split;

  CUTLASS_DEVICE Scheduler(Arguments const& args) {
    int const main = ceil_div(args.bricks, T::kStepBricks);
    steps = main + ceil_div(args.branch_bricks, T::kStepBricks);
    ctas = gridDim.x, split = args.split, tiles = args.row_tiles * args.token_tiles;
    position = split ? start_of(blockIdx.x) : blockIdx.x;
    end = split ? start_of(blockIdx.x + 1) : tiles;
  }

  CUTLASS_DEVICE int start_of(int cta) const { return tiles * steps * cta / ctas; }

  CUTLASS_DEVICE bool next(Arguments const& args, Segment& segment) {
    if (position >= end) return false;
    int tile = position;
    segment.begin = 0, segment.end = steps;
    if (split) {
      tile = position / steps;
      segment.begin = position - tile * steps;
      segment.end = min(steps, segment.begin + end - position);
      position += segment.end - segment.begin;
    } else {
      position += ctas;
    }
    // Groups of eight token tiles share the weights that pass through L2.
    int const group = tile / (8 * args.row_tiles), rest = tile - group * 8 * args.row_tiles;
    int const width = min(8, args.token_tiles - group * 8);
    segment.row_tile = rest / width;
    segment.token_tile = group * 8 + rest - segment.row_tile * width;
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
  CUTLASS_DEVICE uint32_t stage(int s) const { return base + s * T::kStageBytes; }
};

// ---- producer: one thread copies the bricks of each step; tokens first, stages in order

template <class T>
CUTLASS_DEVICE void produce(Arguments const& args, Shared<T> const& shared) {
  uint64_t const stream = evict_first_policy(), keep = evict_last_policy();
  cutlass::arch::launch_dependent_grids();
  int const main = ceil_div(args.bricks, T::kStepBricks);
  int const row_stride = args.bricks + args.branch_bricks;
  // Under programmatic launch the previous kernel may still run: pass 0 fetches weights of the
  // first stages, which no kernel writes; everything else waits.
  int const ahead = min(args.ahead, T::kStages);
  for (int pass = ahead ? 0 : 1; pass < 2; ++pass) {
    if (pass == 1) cutlass::arch::wait_on_dependent_grids();
    Scheduler<T> scheduler(args);
    Ring ring;
    Segment work;
    int count = 0;
    while (scheduler.next(args, work)) {
      uint8_t const* tokens = args.tokens + work.token_tile * args.token_tile_bytes;
      int const row_block = work.row_tile * T::kRowGroups;
      int const row_groups = min(T::kRowGroups, args.row_blocks - row_block);
      for (int step = work.begin; step < work.end; ++step, ++count, ring.advance<T::kStages>()) {
        if (pass == 0 && count == ahead) break;
        bool const branch = step >= main;
        int const first = (branch ? step - main : step) * T::kStepBricks;
        int const bricks = min(T::kStepBricks, (branch ? args.branch_bricks : args.bricks) - first);
        int const token_brick = branch ? T::kBranchTokenBrick : T::kTokenBrick;
        int const weight_bytes = bricks * T::Format::kBytes, token_bytes = bricks * token_brick;
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
          bulk_copy(smem, tokens + at, token_bytes, full, keep);
        }
        if (!fetched) {
          uint8_t const* weights =
              args.weights + (size_t(row_block) * row_stride + (branch ? args.bricks : 0) + first) *
                                 T::Format::kBytes;
          for (int r = 0; r < row_groups; ++r) {
            bulk_copy(smem + T::kWeightsAt + r * T::kStepBricks * T::Format::kBytes,
                      weights + size_t(r) * row_stride * T::Format::kBytes, weight_bytes, full,
                      stream);
          }
        }
      }
      if (pass == 0 && count == ahead) break;
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
  for (int q = blockIdx.x + 1 + threadIdx.x % 32;
       q < scheduler.ctas && scheduler.start_of(q) < tile_start + scheduler.steps; q += 32) {
    uint32_t* const flag = args.flags + q;
    while (!load_flag(flag)) __nanosleep(40);
    *flag = 0;  // ready for the next launch
  }
  __threadfence();
  __syncwarp();
  barrier_arrive(kPartners, T::kRowGroups * 128 + 32);
}

}  // namespace quantkit::sm90
