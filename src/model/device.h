#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/buffer.h"
#include "flash_mla/schedule.h"
#include "flash_mla/tensor.h"
#include "kernels/sampling/token_rule.h"
#include "model/layers.h"
#include "model/page_copies.h"
#include "model/step.h"
#include "model/weights.h"

namespace flash_mla::model {

/// Bytes on their way to the host.
class Download {
 public:
  virtual ~Download() = default;
  /// Returns when they have come. They stay as long as this object.
  virtual const std::byte* wait() = 0;
};

/// A queue of copies between the cache and the host's memory, beside the steps.
class CopyQueue {
 public:
  virtual ~CopyQueue() = default;
  /// What is queued from now on runs behind the work of the device that has been queued so far. To be called by the
  /// thread that queues steps; the others by any one thread at a time.
  virtual void wait_for_steps() = 0;
  /// To the device or from it.
  virtual void copy(std::byte* to, const std::byte* from, std::size_t bytes) = 0;
  /// Of all that has been queued here so far.
  virtual std::unique_ptr<CopyMark> mark() = 0;
};

/// Where a model lives and runs: memory, the making of layers, and steps. Work is queued in the order of the
/// calls, which may return before it ran. A device outlives the layers that it made.
///
/// What is new in a model is a new layer here (or a weight of one); what is new in how a device computes it,
/// a fusion, a format of weights or cache, ranks that share the work, stays behind the layers.
class Device {
 public:
  virtual ~Device() = default;

  /// As Model's.
  virtual std::size_t free_memory() const = 0;
  virtual ScheduleOptions schedule_options(int sequences, bool batch_invariant) const = 0;
  /// Whether calls return before they ran.
  virtual bool queues() const = 0;
  /// Whether a step without tokens is to run as well: for ranks that have some.
  virtual bool runs_empty_steps() const { return false; }
  /// Of the steps that have run, where they are timed; else 0.
  virtual double device_seconds() const = 0;

  // Layers. Weights are read in the call and host memory is free again when it returns; whatever reading them
  // throws, the call throws, and std::bad_alloc where they do not fit.
  /// The type that weights are to be read in: kFloat32 or kBFloat16.
  virtual DType weight_dtype() const = 0;
  /// Whether it takes random values where a weight has no `read`, which are then never on the host.
  virtual bool makes_up_weights() const = 0;
  virtual std::unique_ptr<Embedding> make_embedding(const Weight& table) = 0;
  virtual std::unique_ptr<Attention> make_attention(const AttentionWeights& weights) = 0;
  virtual std::unique_ptr<FeedForward> make_feed_forward(const FeedForwardWeights& weights) = 0;
  virtual std::unique_ptr<FeedForward> make_mixture_of_experts(const MixtureWeights& weights) = 0;
  virtual std::unique_ptr<Head> make_head(const HeadWeights& weights) = 0;
  /// Of the module for multi-token prediction: its input, and its head, which has the weight of `head` and a norm of its
  /// own.
  virtual std::unique_ptr<MtpInput> make_mtp_input(const MtpWeights& weights) = 0;
  virtual std::unique_ptr<Head> make_mtp_head(const Head& head, const MtpWeights& weights) = 0;

  // Steps.
  /// Makes room for steps of up to `num_tokens` tokens and `num_rows` logit rows, so that no later one has
  /// to.
  virtual void reserve(std::int64_t num_tokens, std::int64_t num_rows) = 0;
  /// Hands over the step that the calls below belong to: metadata goes to the device, the decode schedule is
  /// made, once for all layers. A device may append tokens and logit rows whose results nobody reads, to a
  /// size that it has prepared; their slot is -1. `step` must live until the next begin_step.
  virtual void begin_step(Step& step) = 0;
  /// Runs `pass`, which calls the layers from embedding to head and choose(), or replays what it recorded
  /// when it last did so for a step of this shape.
  virtual void run(const std::function<void()>& pass) = 0;
  /// Chooses the tokens of the logit rows from the step's first_chosen on (and maybe of those before): the
  /// likeliest or the drawn one, as Model::collect says.
  virtual void choose(const Matrix& logits) = 0;

  /// Whether it has choose_among.
  virtual bool chooses_among() const = 0;
  /// The same for a step that is masked, behind run(): Model::choose. `rules`: of the logit rows from `first` on, all
  /// whose tokens are wanted.
  virtual void choose_among(std::int64_t first, std::span<const TokenRule> rules) = 0;

  // Results of the last step.
  /// The first `rows` rows of its logits to the host (rows, vocab_size); returns when they have come.
  virtual void download_logits(std::int64_t rows, float* logits) = 0;
  /// Queues the download of the tokens (int32) of its logit rows [first, first + count).
  virtual std::unique_ptr<Download> start_token_download(std::int64_t first, std::int64_t count) = 0;

  // Pages of the cache to the host and back, beside the steps.
  virtual std::unique_ptr<CopyQueue> make_copy_queue() = 0;
  /// Memory of the host that copies are fast to and from. Throws std::bad_alloc.
  virtual Buffer allocate_host(std::size_t bytes) = 0;
};

}  // namespace flash_mla::model
