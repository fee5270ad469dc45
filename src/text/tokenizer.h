#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/text_part.h"

namespace flash_mla::text {

using TokenId = std::int32_t;

/// A byte-level BPE tokenizer, read from the tokenizer.json of a DeepSeek checkpoint. Gives the tokens that
/// Hugging Face's `tokenizers` gives. Immutable; any number of threads may use one object.
///
/// Text that is not UTF-8 is tokenized as if every maximal invalid part were U+FFFD, which is what Python's
/// bytes.decode(errors="replace") makes of it.
class Tokenizer {
 public:
  /// Reads DIR/tokenizer.json and, where DIR/tokenizer_config.json has them, add_bos_token and add_eos_token:
  /// they replace what the post-processor puts around a text, as in the LlamaTokenizerFast of transformers 4
  /// that DeepSeek's files name (the loader of transformers 5 passes over them). Without that file the
  /// post-processor must put a token in front of a text, lest one be missing unnoticed. Throws InvalidArgument for a
  /// malformed file, Unsupported for a feature that DeepSeek's tokenizers do not use; both name the file, the
  /// field and its value.
  static Tokenizer open(const std::filesystem::path& directory);
  /// From the text of a tokenizer.json; `origin` names it in errors.
  static Tokenizer parse(std::string_view tokenizer_json, std::string_view origin);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  /// One past the largest token. A model may have more logits than this: its vocabulary is padded.
  int vocab_size() const;

  /// `add_special_tokens`: what the file's post-processor puts around a text (DeepSeek: the begin-of-sentence
  /// token in front). `allow_special`: special tokens spelled out in the text become those tokens; false
  /// tokenizes them as ordinary text, which is what text of a user should get. (Tokens that were added to
  /// the vocabulary but are not special are recognised either way.)
  /// Throws InvalidArgument for text that the file's regular expressions cannot be run on.
  std::vector<TokenId> encode(std::string_view text, bool add_special_tokens = true,
                              bool allow_special = true) const;

  /// The joined parts as one text, so that words may go on from one part into the next; added tokens only
  /// where they lie within control parts. Throws as above.
  std::vector<TokenId> encode_parts(std::span<const TextPart> parts, bool add_special_tokens = false) const;

  /// The text of `ids`. Bytes that are not UTF-8 become U+FFFD. `skip_special` leaves special tokens out.
  /// A token that the vocabulary lacks (a model's vocabulary is padded) stands for no text; a negative one
  /// throws InvalidArgument.
  std::string decode(std::span<const TokenId> ids, bool skip_special = true) const;

  /// The bytes of one token, not necessarily whole UTF-8 sequences. Empty for a token that the vocabulary
  /// lacks; a negative one throws InvalidArgument.
  std::string_view token_bytes(TokenId id) const;
  bool is_special(TokenId id) const;  ///< false outside the vocabulary
  /// The token whose spelling in the file is `token` ("<｜User｜>"), or -1.
  TokenId token_to_id(std::string_view token) const;
  /// The spelling in the file: the byte-level alphabet's letters, or the content of an added token.
  /// Empty for a token that the vocabulary lacks; a negative one throws InvalidArgument.
  std::string id_to_token(TokenId id) const;

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Decodes token by token. What push returns is always whole UTF-8; the concatenation of everything returned,
/// with flush at the end, is what decode gives for all ids at once.
class StreamDecoder {
 public:
  /// `tokenizer` must outlive it.
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = true)
      : tokenizer_(&tokenizer), skip_special_(skip_special) {}

  /// The text that has become certain with `id`; empty while a UTF-8 sequence is incomplete.
  /// Throws InvalidArgument for a negative token.
  std::string push(TokenId id);
  /// U+FFFD for a sequence that never ended. The decoder is as new afterwards.
  std::string flush();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  std::string pending_;  // at most 3 bytes: the beginning of a sequence
};

}  // namespace flash_mla::text
