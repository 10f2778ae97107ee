// Block-scaled 4-bit GEMM on Blackwell tensor cores, what sm100 and sm120 share.
//
//   D[o, t] = row_scale[o] * token_scale[t] * sum_k W[o, k] X[t, k]  +  branch[o, t]  +  bias[o]
//
// Weights are operand A (o = output channel), tokens operand B, so that few tokens mean a narrow
// tile; D is column-major, which is the row-major [tokens, outputs] of the caller. Both operands
// are packed E2M1 (or FP8) along k, with block scales in the 128x4 tiles of
// cutlass::detail::Sm1xxBlockScaledConfig (quantkit/kernels/scale_layout.py writes them).
// The 16-bit branch is a second accumulation: its FP32 product arrives as the C operand and is
// added in the epilogue before the only rounding.
#pragma once

#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace quantkit {

using mxfp4 = cutlass::mx_float4_t<cutlass::float_e2m1_t>;    // E8M0 scale for 32 values
using nvfp4 = cutlass::nv_float4_t<cutlass::float_e2m1_t>;    // E4M3 scale for 16 values
using mxfp8 = cutlass::mx_float8_t<cutlass::float_e4m3_t>;    // E8M0 scale for 32 values
using bf16 = cutlass::bfloat16_t;
using fp16 = cutlass::half_t;

// What the host passes: plain pointers and extents. `row_scale`, `token_scale` and `bias` may be
// null; `branch` is null exactly when the kernel was built without one.
struct GemmArguments {
  void* output;               // [tokens, outputs] bf16 or fp16
  void const* weights;        // [outputs, k] packed
  void const* weight_scales;  // scale tiles
  void const* tokens;         // [tokens, k] packed
  void const* token_scales;   // scale tiles
  float const* row_scale;     // [outputs]
  float const* token_scale;   // [tokens]
  void const* bias;           // [outputs], the output's type
  float const* branch;        // [tokens, outputs]
  int outputs, token_count, k;
};

// The epilogue as a tree of CUTLASS visitors, evaluated on FP32 fragments.
template <class Output, bool Branch, class CtaTile>
struct ScaleAddBranch {
  static constexpr auto Round = cutlass::FloatRoundStyle::round_to_nearest;
  template <class Element>
  using PerRow = cutlass::epilogue::fusion::Sm90ColBroadcast<
      0, CtaTile, Element, float, cute::Stride<cute::_1, cute::_0, int64_t>>;
  using PerToken = cutlass::epilogue::fusion::Sm90RowBroadcast<
      0, CtaTile, float, float, cute::Stride<cute::_0, cute::_1, int64_t>>;
  template <template <class> class Op, class Out, class... Nodes>
  using Node = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<Op, Out, float, Round>, Nodes...>;

  using Scaled = Node<cutlass::multiplies, float, PerToken, cutlass::epilogue::fusion::Sm90AccFetch>;
  using Sum = Node<cutlass::homogeneous_multiply_add, cute::conditional_t<Branch, float, Output>,
                   PerRow<float>, Scaled, PerRow<Output>>;
  using SumWithBranch =
      Node<cutlass::plus, Output, cutlass::epilogue::fusion::Sm90SrcFetch<float>, Sum>;
  using Tree = cute::conditional_t<Branch, SumWithBranch, Sum>;

  static typename Tree::Arguments arguments(GemmArguments const& args) {
    typename Sum::Arguments sum{
        {args.row_scale, 1.f, {}},                      // multiplier
        {{args.token_scale, 1.f, {}}, {}, {}},          // token scale x accumulator
        {static_cast<Output const*>(args.bias), Output(0), {}},
        {}};
    if constexpr (Branch) {
      return {{}, sum, {}};
    } else {
      return sum;
    }
  }
};

// Tile: MMA tile (outputs, tokens, k), of one SM or of the pair that shares an MMA (sm100).
template <class Arch, class Weights, class Tokens, class Output, bool Branch, class Tile,
          class Cluster, class CtaTile, class EpilogueTile, class EpilogueSchedule>
struct BlockScaledGemm {
  using ElementC = cute::conditional_t<Branch, float, void>;
  using LayoutD = cutlass::layout::ColumnMajor;
  using Epilogue = ScaleAddBranch<Output, Branch, CtaTile>;

  template <class Operand>
  static constexpr int alignment() {  // elements; mixed 4/8-bit operands are unpacked by TMA
    constexpr int bits = cute::sizeof_bits_v<typename Operand::DataType>;
    return bits == 8 ? 16 : cute::is_same_v<Weights, Tokens> ? 32 : 128;
  }

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, cutlass::arch::OpClassBlockScaledTensorOp, Tile, Cluster,
      EpilogueTile, float, float,
      ElementC, LayoutD, 4, Output, LayoutD, 8,
      EpilogueSchedule, typename Epilogue::Tree>::CollectiveOp;

  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, cutlass::arch::OpClassBlockScaledTensorOp,
      Weights, cutlass::layout::RowMajor, alignment<Weights>(),
      Tokens, cutlass::layout::ColumnMajor, alignment<Tokens>(),
      float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<
          static_cast<int>(sizeof(typename CollectiveEpilogue::SharedStorage))>,
      cutlass::gemm::collective::KernelScheduleAuto>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue, void>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using ScaleConfig = typename CollectiveMainloop::Sm1xxBlkScaledConfig;

  static typename Gemm::Arguments arguments(GemmArguments const& args) {
    auto shape = cute::make_shape(args.outputs, args.token_count, args.k, 1);
    auto along_k = cute::make_stride(int64_t(args.k), cute::_1{}, int64_t(0));
    auto along_outputs = cute::make_stride(cute::_1{}, int64_t(args.outputs), int64_t(0));
    using A = typename Weights::DataType;
    using B = typename Tokens::DataType;
    using Scale = typename Weights::ScaleFactorType;
    return {cutlass::gemm::GemmUniversalMode::kGemm,
            shape,
            {static_cast<A const*>(args.weights), along_k,
             static_cast<B const*>(args.tokens), along_k,
             static_cast<Scale const*>(args.weight_scales),
             ScaleConfig::tile_atom_to_shape_SFA(shape),
             static_cast<Scale const*>(args.token_scales),
             ScaleConfig::tile_atom_to_shape_SFB(shape)},
            {Epilogue::arguments(args), args.branch, along_outputs,
             static_cast<Output*>(args.output), along_outputs}};
  }
};

}  // namespace quantkit

// The library's entry points: 0 for success, a CUTLASS status below 100, 100 + a CUDA error above.
#define QUANTKIT_EXPORT(...)                                                                     \
  using Exported = __VA_ARGS__;                                                                  \
  extern "C" int64_t workspace_bytes(quantkit::GemmArguments const* args) {                      \
    return static_cast<int64_t>(Exported::Gemm::get_workspace_size(Exported::arguments(*args))); \
  }                                                                                              \
  extern "C" int can_run(quantkit::GemmArguments const* args) {                                  \
    return static_cast<int>(Exported::Gemm::can_implement(Exported::arguments(*args)));          \
  }                                                                                              \
  extern "C" int run(quantkit::GemmArguments const* args, void* workspace, void* stream) {       \
    typename Exported::Gemm gemm;                                                                \
    auto status = gemm.run(Exported::arguments(*args), workspace,                                \
                           static_cast<cudaStream_t>(stream));                                   \
    if (status != cutlass::Status::kSuccess) return static_cast<int>(status);                    \
    auto error = cudaGetLastError();                                                             \
    return error == cudaSuccess ? 0 : 100 + static_cast<int>(error);                             \
  }
