#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/matrix.h"
#include "flash_mla/expert_counts.h"

namespace flash_mla::model {

// What a decoder is made of, each with its weights in its device's memory and layout. A device makes them
// (device.h) and answers them; how it cuts them into kernels, and what it takes together, is its own affair.
//
// Every forward() belongs to the step that Device::begin_step took last. It is queued behind those before it
// and may return before it has run. In a batch-invariant step no row's bits depend on the other rows.

/// The residual stream, to which layers add: x (tokens, hidden) of the step, in the device's dtype. Only the
/// layers of its device look inside: what they add may be put off until something needs it.
struct Residual {
  Matrix x;
  /// The layer whose norm of x lies ready beside it, since the one before made it at once; or null.
  const void* normed_for = nullptr;
};

/// Which rows of x a layer leaves are read by those behind it.
enum class Rows {
  kAll,
  kLogits,  ///< the step's logit_rows: a device may leave out all others, for this layer and those behind it
};

/// x = table[token ids]
class Embedding {
 public:
  virtual ~Embedding() = default;
  /// x of the step's tokens. A negative id is a token that the step before chose (ForwardBatch::token_ids).
  virtual Residual forward() = 0;
};

/// x += W_o · attend(norm(x)): multi-head latent attention and, as its own, the layer's part of the paged
/// cache, to which it appends before it attends. Tokens of sequences with few new ones take the absorbed form
/// over the cached latents, the others expand keys and values from them (step.h).
class Attention {
 public:
  virtual ~Attention() = default;
  virtual void forward(Residual& x, Rows rows) = 0;

  /// Of the layer's cache: kPageSize tokens.
  virtual std::size_t bytes_per_page() const = 0;
  /// Gives the cache's memory back; contents are lost.
  virtual void free_cache() = 0;
  /// A new cache, with anything in it. Throws std::bad_alloc.
  virtual void allocate_cache(int num_pages) = 0;
  /// Zeros all of it, where some of it may be read before it is written: by the module for multi-token prediction.
  virtual void clear_cache() {}
  /// Copies one page; queued as forward() is.
  virtual void copy_page(int source, int target) = 0;
  /// Where a page lies in the device's memory: latents and keys, then those of an indexer, which may be empty; together
  /// bytes_per_page().
  virtual std::array<std::span<std::byte>, 2> page(int index) const = 0;
  /// What a page's bytes mean, in words: whoever keeps pages never gives one of other words back.
  virtual std::string page_format() const = 0;
  /// Whether a page is (kPageSize, 512 + 64) bfloat16 and nothing else.
  virtual bool has_plain_rows() const { return false; }
};

/// x += ffn(norm(x)): a dense feed-forward network, down · (silu(gate · h) * (up · h)), or a mixture of
/// experts of that form.
class FeedForward {
 public:
  virtual ~FeedForward() = default;
  virtual void forward(Residual& x) = 0;
  /// The layer that always reads x next, where there is one: its norm may be taken along.
  virtual void set_next(const Attention& next) { static_cast<void>(next); }
  /// Experts that the first `num_tokens` tokens of the last step took, (num_tokens, any number of each), with
  /// the shared ones counted from n_routed_experts on if they are in it; waits for the step. Empty: a dense
  /// layer, or there were fewer tokens.
  virtual std::vector<std::int32_t> experts_taken(int num_tokens) const {
    static_cast<void>(num_tokens);
    return {};
  }
  /// How often each routed expert has been chosen, and how many of the choices have run here (rank_counts, of one). From
  /// any thread, while steps run. Without counts: a dense layer, or a device that does not count.
  virtual ExpertCounts expert_counts() const { return {}; }
};

/// x = W · [norm(E[token]) ; norm(state)]: the input of the module for multi-token prediction, of tokens and the states
/// that the model, or the module itself, has left of the tokens before them.
class MtpInput {
 public:
  virtual ~MtpInput() = default;
  /// Keeps the states that the model's last layer leaves of all tokens of a step, after the model's last norm.
  virtual void keep(const Residual& x) = 0;
  /// Keeps what the module's layer leaves of the step's logit rows, after its norm.
  virtual void keep_own(const Residual& x) = 0;
  /// x is the embedding of the tokens of a step that reads states (Step::reads, Step::states).
  virtual void forward(Residual& x) = 0;
};

/// logits = W · norm(x), of the step's logit_rows.
class Head {
 public:
  virtual ~Head() = default;
  /// (logit_rows, vocab_size) float32; they stay until the next step.
  virtual Matrix forward(const Residual& x) = 0;
};

}  // namespace flash_mla::model
