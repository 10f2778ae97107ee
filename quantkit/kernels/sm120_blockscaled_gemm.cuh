// Workstation Blackwell (sm_120a): warp-level block-scaled mma.sync, accumulators in registers.
#pragma once

#include "sm1xx_blockscaled_gemm.cuh"

namespace quantkit {

template <class Weights, class Tokens, class Output, bool Branch, int OutputTile, int TokenTile,
          int KTile>
struct Sm120BlockScaledGemm {
  using Tile = cute::Shape<cute::Int<OutputTile>, cute::Int<TokenTile>, cute::Int<KTile>>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using type = BlockScaledGemm<cutlass::arch::Sm120, Weights, Tokens, Output, Branch, Tile, Cluster,
                               Tile, cutlass::epilogue::collective::EpilogueTileAuto,
                               cutlass::epilogue::collective::EpilogueScheduleAuto>;
};

}  // namespace quantkit
