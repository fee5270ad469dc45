#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "base/matrix.h"
#include "model/device/cpu/context.h"
#include "model/device/cpu/expert_exchange.h"
#include "model/device/cpu/feed_forward.h"
#include "model/device/cpu/linear.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

class CpuMixtureOfExperts : public FeedForward {
 public:
  CpuMixtureOfExperts(CpuContext& context, const MixtureWeights& weights);

  void forward(Residual& x) override;
  std::vector<std::int32_t> experts_taken(int num_tokens) const override;
  ExpertCounts expert_counts() const override;

 private:
  struct Expert {
    cpu::PackedWeight gate_up, down;
    std::vector<std::string> gate_up_tensors, down_tensors;
  };
  /// Some of the rows of one expert.
  struct Piece {
    std::size_t expert;
    std::int64_t first, count;
  };

  void route(const Matrix& h);
  /// The rank that runs an expert for a token.
  int runs_at(std::int64_t token, std::int32_t expert) const;
  /// Runs this rank's experts: a row of results for every choice that is its own, at places_[choice].
  Matrix run_experts(const Matrix& h);
  /// rows[t] += the results of token t's choices that are this rank's, weighted, in the order of the choices.
  /// `first`: the token of the first row; places_ begin with it.
  void add_results(const Matrix& results, const Matrix& rows, DType dtype, std::int64_t first = 0) const;
  void add_results_of_all(const Matrix& results, const Matrix& x);
  /// x += the results of the tokens' experts, which run where they are, beside those of other ranks' tokens.
  void add_from_ranks(const Matrix& h, const Matrix& x);
  void share_experts(std::int64_t num_tokens);
  void find_own(std::int64_t num_tokens);
  void count_choices();
  void sort_by_expert();
  void run_expert(const Matrix& h, const Piece& piece, const Matrix& out) const;

  CpuContext& context_;
  std::vector<float> norm_;
  cpu::PackedWeight router_;  ///< (n_routed_experts, hidden) float32
  std::vector<float> correction_bias_;
  std::vector<std::vector<int>> ranks_;  ///< that have each routed expert; empty: this one has all
  std::vector<std::int32_t> own_index_;  ///< of each routed expert, its place in experts_; -1: not here
  std::vector<int> taken_by_;            ///< of each routed expert of the step: the rank that runs it
  std::vector<Expert> experts_;
  std::unique_ptr<CpuGatedNetwork> shared_;  ///< or null
  CpuExpertExchange exchange_;               ///< of ranks with tokens of their own

  // Only the thread of the steps writes to them.
  std::vector<std::atomic<std::int64_t>> counts_;  ///< choices of each routed expert so far
  std::atomic<std::int64_t> own_count_ = 0;        ///< of which ran here

  Buffer ids_;  ///< of the last step (tokens, num_experts_per_tok) int32
  std::int64_t num_tokens_ = 0;
  std::vector<std::int32_t>
      own_;  ///< of each choice, the place in experts_ of its expert; -1: another rank's
  std::vector<std::int64_t> expert_ends_, by_expert_, places_;  ///< places_: the inverse of by_expert_, or -1
  std::vector<Piece> pieces_;
};

}  // namespace flash_mla::model
