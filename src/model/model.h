#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/matrix.h"
#include "base/page_size.h"
#include "flash_mla/expert_counts.h"
#include "flash_mla/model_options.h"
#include "flash_mla/schedule.h"
#include "kernels/sampling/draw.h"
#include "kernels/sampling/token_rule.h"
#include "model/page_copies.h"

namespace flash_mla::checkpoint {
struct ModelConfig;
}

namespace flash_mla::model {

using checkpoint::ModelConfig;

/// One step over several sequences, each with a run of new tokens (one in decoding, a chunk in prefill). All
/// arrays live on the host and only for the call.
struct ForwardBatch {
  /// (num_tokens), sequence after sequence. -1 - i: the i-th token that the step before this one chose
  /// (Model::collect's `tokens`), which then had no logit_rows; where that is -1, any token.
  std::span<const std::int32_t> token_ids;
  std::span<const std::int32_t>
      query_starts;  ///< (num_seqs + 1): tokens of sequence i are [starts[i], starts[i+1])
  std::span<const std::int32_t>
      seq_lens;  ///< (num_seqs): tokens in the cache once this step has been appended
  std::span<const std::int32_t> block_table;  ///< (num_seqs, max_blocks): pages of each sequence
  int max_blocks = 0;
  std::span<const std::int32_t> logit_rows;   ///< tokens (indices into token_ids) whose logits are wanted
  std::span<const std::int32_t> drawn_rows;   ///< tokens of which only a successor is wanted, drawn as
  std::span<const Draw> draws;                ///< (drawn_rows.size()) these say
  std::span<const std::int32_t> greedy_rows;  ///< tokens of which only the likeliest successor is wanted
  /// Successors of drawn_rows and greedy_rows wait for Model::choose, which says among which tokens, and what is added to
  /// their logits.
  bool masked = false;
  /// The same bits for a sequence whatever else is in the batch.
  bool batch_invariant = false;
};

/// What the module for multi-token prediction is to go over behind a step, and draft.
struct DraftBatch {
  /// Tokens that follow tokens of the last step, one after another in each sequence; positions, and places in the
  /// module's cache, are those of the tokens that they follow. Pages reach as far as the drafts. Of rows and draws
  /// nothing counts.
  ForwardBatch tokens;
  std::span<const std::int32_t> states;  ///< (num_tokens): the last step's token (index) that each follows
  std::span<const std::int32_t> num_drafts;  ///< (num_seqs), >= 0: tokens wanted behind the sequence's last
  std::span<const Draw> draws;  ///< (sum of num_drafts): how each is drawn; scale 0: the likeliest
  /// How often the module is applied at least: ranks with tokens of their own do so equally often.
  int num_applications = 0;
};

/// When one of several ranks was at a step.
struct RankSpan {
  std::chrono::steady_clock::time_point begin, end;
  double exchange_seconds = 0;  ///< in exchanges with the others, the wait for them included
};

/// A loaded model with its paged latent cache. Position of a sequence's n-th new token is
/// seq_len - new tokens + n; forward appends every new token's latent to the pages before it attends.
class Model {
 public:
  virtual ~Model() = default;
  virtual int vocab_size() const = 0;
  virtual std::int64_t max_position() const = 0;
  virtual std::size_t bytes_per_page() const = 0;  ///< over all layers
  /// Bytes of the device's own memory that nobody has taken; 0: it works in the host's.
  virtual std::size_t free_memory() const { return 0; }
  /// How decode attention of that many sequences, a token each, is divided among workers.
  virtual ScheduleOptions schedule_options(int sequences, bool batch_invariant) const = 0;
  /// (Re-)allocates the cache; contents are lost. Throws std::bad_alloc.
  virtual void allocate_cache(int num_pages) = 0;
  /// Copies one page, in every layer.
  virtual void copy_page(int source, int target) = 0;
  /// Bytes of a page in each layer of the cache.
  virtual std::vector<std::size_t> layer_page_bytes() const { return {bytes_per_page()}; }
  /// `on_layer` is called in launch(), with the number of each layer, once the latents of the step's tokens are in its
  /// cache; it must not throw. Null: no more. False where they are not there before launch() returns: then never.
  virtual bool set_on_layer(const std::function<void(int layer)>& on_layer) {
    static_cast<void>(on_layer);
    return false;
  }
  /// What the bytes of a page mean, and of which device they are, in words. A page of a model with the same weights and
  /// the same words is as good as a page of this one's own.
  virtual std::string page_format() const { return {}; }
  /// Layers, if all their pages are (kPageSize, 576) bfloat16, latent and then interleaved rotary part, as vLLM has them;
  /// else 0.
  virtual int num_plain_layers() const { return 0; }
  /// Copies between the cache and the host, beside the steps. Throws Unsupported where there are none.
  virtual std::unique_ptr<PageCopies> make_page_copies();
  /// Of a page as those copies have it on the host.
  virtual std::size_t bytes_per_copied_page() const { return bytes_per_page(); }
  /// Memory of the host that such copies are fast to and from. Throws std::bad_alloc.
  virtual Buffer allocate_host(std::size_t bytes) const;
  /// Makes room for steps of up to `num_tokens` tokens with `num_rows` rows of all three kinds, so that no
  /// later step has to. Optional.
  virtual void reserve(int num_tokens, int num_rows) = 0;
  /// Starts a step; collect() gives its results. Steps run in the order of their launches, and so do copies
  /// of pages among them. Two may be on their way, but one with logit_rows must be collected before the next
  /// is launched. If it throws, the step counts as not launched.
  virtual void launch(const ForwardBatch& batch) = 0;
  /// Whether it takes steps that are masked.
  virtual bool draws_take_masks() const { return false; }
  /// Chooses the tokens of the step that was launched last and is masked, once, before it is collected or another is
  /// launched: what they may be takes the host time, in which the device works. `rules`: of each drawn row, then of each
  /// greedy row, of vocab_size tokens. They are read in the call. Where a rule leaves no token, there is none (-1).
  virtual void choose(std::span<const TokenRule> rules) {
    static_cast<void>(rules);
    throw std::logic_error("choose: this model takes no masks");
  }
  /// Waits for the oldest step on its way and writes to host memory: logits (logit_rows.size(), vocab_size)
  /// float32, and tokens (drawn_rows.size() + greedy_rows.size()), the drawn ones first; of greedy rows the
  /// token of the largest logit, the first among equals. A token is -1 where a logit is NaN or +inf or all
  /// are -inf. If it throws, the step is over all the same.
  virtual void collect(float* logits, std::int32_t* tokens) = 0;
  /// Both.
  void forward(const ForwardBatch& batch, float* logits, std::int32_t* tokens) {
    launch(batch);
    collect(logits, tokens);
  }
  /// Whether the model has a module for multi-token prediction, and draft() its service.
  virtual bool has_draft_module() const { return false; }
  /// Has the module go over tokens, which become part of its cache, and draft: writes the drafts, sequence after
  /// sequence, to `tokens`; -1 from where the module's logits are not finite. No step may be on its way. Throws
  /// InvalidArgument.
  virtual void draft(const DraftBatch& batch, std::int32_t* tokens);
  /// Whether launch() returns before the step has run.
  virtual bool launches_ahead() const { return false; }
  /// Of a rank with tokens of its own (ModelOptions::dp), whose steps are those of the others: takes part, without any,
  /// in the step that it has not launched. All ranks call it behind every step, whether they have had tokens or not, each
  /// on a thread of its own. Does not throw: where a rank has failed, broken() says so.
  virtual void end_step() {}

  /// Of the weights of products, the embedding and the LM head that it has, of all ranks; 0 where nobody counts.
  virtual double weight_bytes() const { return 0; }

  // For benchmarks; 0 where nobody counts.
  /// Time that the device has worked on steps since the model was made, with ModelOptions::time_steps: from
  /// the start of a step's first kernel to the end of its last.
  virtual double device_seconds() const { return 0; }
  /// Experts that the first `num_tokens` tokens of the last step took, summed over the layers.
  virtual std::int64_t experts_hit(int num_tokens) {
    static_cast<void>(num_tokens);
    return 0;
  }
  /// How often each expert of every mixture layer has been chosen, the module's included. From any thread, while steps run.
  /// Empty where why_no_expert_counts() says so.
  virtual std::vector<ExpertCounts> expert_counts() const { return {}; }
  /// Empty: it counts.
  virtual std::string why_no_expert_counts() const {
    return "this model does not count its experts' choices";
  }
  /// Of every rank, between steps; empty where the model is whole.
  virtual std::vector<RankStats> rank_stats() const { return {}; }
  /// The last step of every rank, likewise.
  virtual std::vector<RankSpan> rank_spans() const { return {}; }
  /// Why no step will ever run again; empty: they do.
  virtual std::string broken() const { return {}; }
};

struct ModelOptions {
  ModelDevice device = ModelDevice::kAuto;
  ModelPrecision precision = ModelPrecision::kAuto;
  ModelQuantize quantize = ModelQuantize::kNone;
  ModelKvCache kv_cache = ModelKvCache::kAuto;
  /// CPU: index keys in e4m3 whatever kv_cache says, as a GPU has them. For comparisons.
  bool fp8_index_keys = false;
  int num_threads = 0;  ///< CPU: 0 for as many as OpenMP would use; of all ranks together
  /// Ranks that share the attention, a divisor of its heads, and parts of the experts, a divisor of tp * dp (0: that).
  int tp = 1, ep = 0;
  /// Groups of tp ranks with tokens and a cache of their own, which share the routed experts alone with the others.
  int dp = 1;
  /// CUDA, with tp above 1: the GPU of each rank, by its CUDA index, the first 0; empty: GPUs 0 to tp - 1. Ranks with the same
  /// one are streams of it.
  std::vector<int> devices;
  std::string expert_placement = "linear";  ///< or "round-robin", or a file's path (ExpertPlacement)
  /// The steps will be batch-invariant; then they have the same bits on every number of ranks of a CPU.
  bool batch_invariant = false;
  bool draft_module =
      false;                ///< load the module for multi-token prediction too, where the checkpoint has one
  bool time_steps = false;  ///< CUDA: keep count of Model::device_seconds
  /// CUDA: the cache that there must be room for besides the weights; pages, or if they are 0 bytes.
  int cache_pages = 0;
  std::size_t cache_bytes = 0;
  /// CPU: called before every product but the router's with the names of the weights' tensors and the rows that it
  /// takes, which a step may do from several threads at once. For calibration.
  std::function<void(std::span<const std::string> tensors, const Matrix& rows)> on_product;
  std::function<void(const LoadProgress&)> on_load;  ///< before the first layer, and after every one
};

/// Loads config and weights of a Hugging Face model directory. Throws InvalidArgument or Unsupported.
std::unique_ptr<Model> load_model(const std::filesystem::path& directory, const ModelOptions& options = {});
/// The same for options.dp ranks: the model of each. Every step is one of all of them (Model::end_step).
std::vector<std::unique_ptr<Model>> load_models(const std::filesystem::path& directory,
                                                const ModelOptions& options = {});

/// A model of the configuration with random weights, the same ones every time, for benchmarks and load tests:
/// no file is read, and nothing sensible comes out. Throws as load_model does.
std::unique_ptr<Model> make_random_model(const ModelConfig& config, const ModelOptions& options = {});
/// The same for options.dp ranks.
std::vector<std::unique_ptr<Model>> make_random_models(const ModelConfig& config,
                                                       const ModelOptions& options = {});

/// What tells the weights of a model directory from others: a digest, in hexadecimal, of its config.json and of what its
/// safetensors say and hold, of large tensors a sample. Throws InvalidArgument.
std::string weights_digest(const std::filesystem::path& directory);
/// Of config.json alone.
std::string config_digest(const std::filesystem::path& directory);

}  // namespace flash_mla::model
