#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "base/buffer.h"
#include "base/matrix.h"
#include "kernels/moe/sm90/moe.h"
#include "model/device/cuda/attention.h"
#include "model/device/cuda/context.h"
#include "model/device/cuda/copy_queue.h"
#include "model/device/cuda/expert_parts.h"
#include "model/device/cuda/feed_forward.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

/// The shared experts are experts that every token chooses, with weight 1, behind the routed ones. Of ranks each has some
/// of the routed experts, and its share of the shared ones' width as a network of its own.
class CudaMixtureOfExperts : public FeedForward {
 public:
  CudaMixtureOfExperts(CudaContext& context, const MixtureWeights& weights);

  /// Leaves h = norm(x) of the next layer, if one was set, ready as well.
  void forward(Residual& x) override;
  void set_next(const Attention& next) override { next_ = &static_cast<const CudaAttention&>(next); }
  std::vector<std::int32_t> experts_taken(int num_tokens) const override;
  /// As of steps that have run.
  ExpertCounts expert_counts() const override;

 private:
  void place_experts(const std::vector<std::vector<int>>& ranks);
  bool cuts_shared_experts(std::int64_t scale_columns) const;
  bool takes_e4m3_experts(const MixtureWeights& weights) const;
  bool takes_int4_experts(const MixtureWeights& weights) const;
  [[noreturn]] void throw_for_sizes(const char* quantize) const;
  void upload(const ExpertParts& parts, const ReadExpert& read);
  void read_experts(const MixtureWeights& weights);
  void read_e4m3_experts(const MixtureWeights& weights);
  void make_up_experts();
  Buffer& ids() const { return context_.buffers.expert_ids[index_]; }
  std::int64_t expert_elements() const;
  void norm_and_route(const Matrix& x, const Matrix& h);
  sm90::RouteArgs route_args(const Matrix& h);
  void add_experts(const Matrix& h, const Matrix& x);
  void find_local(std::int64_t tokens);
  void add_from_ranks(const Matrix& h, const Matrix& x);

  CudaContext& context_;
  Buffer norm_;
  Buffer router_;           ///< (n_routed_experts, hidden) float32
  Buffer correction_bias_;  ///< (n_routed_experts) float32, or empty
  std::int64_t intermediate_;
  int num_experts_;                         ///< of this rank, with the shared ones unless they are shared_
  CudaMatrix gate_up_;                      ///< (num_experts, 2 * intermediate, hidden)
  CudaMatrix down_;                         ///< (num_experts, hidden, intermediate); both of one form
  std::optional<CudaGatedNetwork> shared_;  ///< of ranks
  std::vector<int> own_;                    ///< of ranks: the routed experts that are this one's
  std::vector<int> replicas_;  ///< of these, on how many ranks they are; each counts an equal share
  Buffer places_;              ///< of ranks: an sm90::ExpertPlace for each routed expert
  std::size_t index_;          ///< among the mixture layers
  const CudaAttention* next_ = nullptr;
  Buffer counts_;  ///< (n_routed_experts) unsigned long long: choices of each so far

  // Beside the steps, for whoever looks at the counts.
  mutable std::mutex mutex_;  ///< of what follows
  mutable CudaCopyQueue copies_;
  Buffer host_counts_;  ///< page-locked
};

}  // namespace flash_mla::model
