// Runs a grid on a CPU: fibers in turns, bulk copies between turns (see emulated_atoms.cuh).
#pragma once

#include "emulated_cuda.cuh"

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

inline void perform(Sent const& sent) {
  EMULATED_REQUIRE(sent.to->running > 0);  // or its shared memory is another's by now
  std::memcpy(sent.to->shared + sent.smem, sent.v, sizeof sent.v);
  using Barrier = quantkit::sm90::ClusterTransactionBarrier;
  reinterpret_cast<Barrier*>(sent.to->shared + sent.barrier)->complete(sizeof sent.v);
  moved = true;
}
// Some of what is under way arrives.
template <class Transfer, class Random>
void progress(std::vector<Transfer>& transfers, Random& random) {
  std::vector<Transfer> later;
  for (Transfer const& transfer : transfers) {
    if (random() % 4)
      later.push_back(transfer);
    else
      perform(transfer);
  }
  transfers = later;
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
    cta.index = dim3(first + c, 0, 0), cta.rank = int(c % cluster), cta.threads = cta.running = threads;
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
      live -= fiber.done, fiber.cta->running -= fiber.done;
    }
    self = nullptr;
    progress(copies, random), progress(sent, random);
    if (!moved && copies.empty() && sent.empty()) {
      for (auto const& fiber : fibers) {
        if (!fiber->done && fiber->lane == 0) {
          std::fprintf(stderr, "emulator: deadlock, CTA %u thread %u waits for %s\n",
                       fiber->cta->index.x, fiber->index.x, fiber->waits_for);
        }
      }
      return cudaErrorLaunchTimeout;
    }
  }
  EMULATED_REQUIRE(copies.empty() && sent.empty());
  if (!failed) return cudaSuccess;
  std::fprintf(stderr, "emulator: not so: %s\n", failed);
  failed = nullptr, copies.clear(), sent.clear();
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
  // Static shared memory is one for all here: CTAs that may have such follow one another. The GEMM,
  // whose CTAs meet, has more than both kinds could be.
  unsigned const each = config->dynamicSmemBytes > (48 << 10) ? config->gridDim.x : 1;
  for (unsigned first = 0; first < config->gridDim.x; first += each) {
    cudaError_t const error = emulated::run_ctas(*config, first, each, cluster);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
