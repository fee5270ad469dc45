#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "flash_mla/text_format.h"

namespace flash_mla::grammar {

/// Matcher::allowed would take so long that others would have to wait for it.
struct TooSlow : std::runtime_error {
  TooSlow()
      : std::runtime_error(
            "the format of the text takes too long: its grammar is too large or too ambiguous") {}
};

/// Where a text stands in its grammar. Used by one thread at a time.
class Matcher {
 public:
  virtual ~Matcher() = default;
  /// Sets bit t % 32 of mask[t / 32] for every token t that may come next, and clears the others. An end token may
  /// come where the text may end. `mask` has (vocab_size + 31) / 32 words. Throws TooSlow.
  virtual void allowed(std::span<std::uint32_t> mask) = 0;
  /// Goes on by a token; false if it is not one of those allowed.
  virtual bool accept(std::int32_t token) = 0;
  /// Goes on by bytes, whatever tokens they came in; false if they are not allowed.
  virtual bool accept_text(std::string_view bytes) = 0;
  /// Nothing may follow.
  virtual bool ended() const = 0;
};

/// A grammar made ready for a vocabulary. Immutable to the eye; any number of threads may use one object.
class Grammar {
 public:
  virtual ~Grammar() = default;
  /// At the beginning of a text. `end_tokens` come only where it may end; without any it ends as soon as it may.
  virtual std::unique_ptr<Matcher> matcher(std::vector<std::int32_t> end_tokens) const = 0;
  /// Of memory, about; it grows with the places that texts come to.
  virtual std::size_t num_bytes() const = 0;
};

/// The tokens that a text is made of.
struct Vocabulary {
  int size = 0;                    ///< tokens of the model, at least bytes.size()
  std::vector<std::string> bytes;  ///< by token; empty: never part of a text
  std::vector<std::int32_t> ends;  ///< end a text
};

/// Makes grammars, and keeps those that were asked for last. Any number of threads may use one object.
class Compiler {
 public:
  explicit Compiler(Vocabulary vocabulary);
  ~Compiler();

  /// Takes up to a second for the largest that are let in. `format` is not free text. Throws InvalidArgument for
  /// what is malformed or too large, Unsupported for what the grammar engine would pass over, by name.
  std::shared_ptr<const Grammar> compile(const TextFormat& format);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace flash_mla::grammar
