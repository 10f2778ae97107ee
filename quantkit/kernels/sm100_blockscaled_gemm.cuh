// Data-centre Blackwell (sm_100a): tcgen05 block-scaled MMA, accumulators in tensor memory.
#pragma once

#include "sm1xx_blockscaled_gemm.cuh"

namespace quantkit {

// OutputTile 128: one SM an MMA. OutputTile 256: a pair of SMs shares the MMA and its operands.
template <class Weights, class Tokens, class Output, bool Branch, int OutputTile, int TokenTile,
          int KTile>
struct Sm100BlockScaledGemm {
  static_assert(OutputTile == 128 || OutputTile == 256);
  static constexpr int Sms = OutputTile / 128;
  using Tile = cute::Shape<cute::Int<OutputTile>, cute::Int<TokenTile>, cute::Int<KTile>>;
  using CtaTile = cute::Shape<cute::_128, cute::Int<TokenTile>, cute::Int<KTile>>;
  using Cluster = cute::Shape<cute::Int<Sms>, cute::_1, cute::_1>;
  // The widest tile with an FP32 branch leaves no shared memory to the main loop unless the
  // epilogue works in narrow strips.
  using EpilogueTile =
      cute::conditional_t<TokenTile == 256, cute::Shape<cute::_128, cute::_32>,
                          cutlass::epilogue::collective::EpilogueTileAuto>;
  using EpilogueSchedule =
      cute::conditional_t<Sms == 2, cutlass::epilogue::TmaWarpSpecialized2Sm,
                          cutlass::epilogue::TmaWarpSpecialized1Sm>;
  using type = BlockScaledGemm<cutlass::arch::Sm100, Weights, Tokens, Output, Branch, Tile, Cluster,
                               CtaTile, EpilogueTile, EpilogueSchedule>;
};

}  // namespace quantkit
