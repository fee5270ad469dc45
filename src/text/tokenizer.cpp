#include "text/tokenizer.h"

#include <fmt/format.h>

#include <limits>
#include <unordered_map>

#include "base/json.h"
#include "flash_mla/error.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/byte_alphabet.h"
#include "text/pre_tokenizer.h"
#include "text/utf8.h"

namespace flash_mla::text {
namespace {

constexpr TokenId kMaxToken = 1 << 24;

struct Entry {
  std::string spelling;  // in the file
  std::string bytes;     // what it stands for
  bool special = false;
};

struct StringHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};

void require_null(const JsonObject& in, const char* name) {
  if (in.has(name)) in.refuse(name, "null");
}

}  // namespace

struct Tokenizer::Impl {
  std::vector<Entry> entries;  // by token; one without spelling does not exist
  std::unordered_map<std::string, TokenId, StringHash, std::equal_to<>> ids;
  AddedTokens added, added_normalized;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  bool ignore_merges = false;
  std::unordered_map<std::string, TokenId, StringHash, std::equal_to<>> words;  // by bytes, if ignore_merges
  std::vector<TokenId> prefix, suffix;                                          // around every text

  // ------------------------------------------------------------------------------------ reading

  void read(const JsonObject& in) {
    require_null(in, "truncation");
    require_null(in, "padding");
    if (in.has("normalizer")) check_normalizer(in.object("normalizer"));
    if (!in.has("pre_tokenizer")) in.refuse("pre_tokenizer", "one that ends with ByteLevel");
    pre_tokenizer = PreTokenizer::parse(in.object("pre_tokenizer"));
    if (!in.has("decoder")) in.refuse("decoder", "a ByteLevel");
    const JsonObject decoder = in.object("decoder");
    if (decoder.string("type") != "ByteLevel") decoder.refuse("type", "\"ByteLevel\"");
    read_model(in.object("model"));
    if (in.has("added_tokens")) read_added_tokens(in);
    if (in.has("post_processor")) read_post_processor(in.object("post_processor"));
  }

  static void check_normalizer(const JsonObject& in) {
    if (in.string("type") != "Sequence") in.refuse("type", "none, or an empty Sequence");
    if (!in.array("normalizers").empty()) in.refuse("normalizers", "none");
  }

  void name(const JsonObject& in, const std::string& spelling, TokenId id) {
    if (static_cast<std::size_t>(id) >= entries.size()) entries.resize(static_cast<std::size_t>(id) + 1);
    Entry& entry = entries[static_cast<std::size_t>(id)];
    if (!entry.spelling.empty()) {
      throw InvalidArgument(fmt::format("{}: token {} is both {} and {}: expected one of them", in.origin(),
                                        id, shown(entry.spelling), shown(spelling)));
    }
    entry.spelling = spelling;
    entry.bytes = letters_to_bytes(spelling).value_or(spelling);
    ids.emplace(spelling, id);
  }

  void read_model(const JsonObject& in) {
    if (in.string_or("type", "BPE") != "BPE") in.refuse("type", "\"BPE\"");
    if (in.number_or("dropout", 0.0, 0.0, 1.0) != 0.0) in.refuse("dropout", "none");
    if (!in.string_or("continuing_subword_prefix", "").empty())
      in.refuse("continuing_subword_prefix", "none");
    if (!in.string_or("end_of_word_suffix", "").empty()) in.refuse("end_of_word_suffix", "none");
    if (in.boolean_or("byte_fallback", false)) in.refuse("byte_fallback", "false");
    ignore_merges = in.boolean_or("ignore_merges", false);

    const JsonObject vocab = in.object("vocab");
    for (const auto& [spelling, id] : vocab.json().items()) {
      name(in, spelling, static_cast<TokenId>(vocab.integer(spelling.c_str(), 0, kMaxToken)));
    }
    for (int byte = 0; byte < 256; ++byte) {
      const auto letter = ids.find(byte_letter(static_cast<unsigned char>(byte)));
      if (letter != ids.end()) bpe.set_byte(static_cast<unsigned char>(byte), letter->second);
    }
    // A token for unknown bytes never comes up if there are none.
    if (in.has("unk_token") && !bpe.has_every_byte())
      in.refuse("unk_token", "null, or all 256 bytes in the vocabulary");
    if (ignore_merges) {
      for (const auto& [spelling, id] : ids) {
        if (auto bytes = letters_to_bytes(spelling)) words.emplace(std::move(*bytes), id);
      }
    }
    const Json& merges = in.array("merges");
    for (std::size_t i = 0; i < merges.size(); ++i) read_merge(in, merges[i], i);
  }

  /// "left right", or ["left", "right"].
  void read_merge(const JsonObject& in, const Json& merge, std::size_t index) {
    const auto fail = [&](const std::string& expected) {
      throw InvalidArgument(
          fmt::format("{}: model.merges[{}] = {}: expected {}", in.origin(), index, shown(merge), expected));
    };
    std::string left, right;
    if (merge.is_string()) {
      const auto& text = merge.get_ref<const std::string&>();
      const std::size_t space = text.find(' ');
      if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) fail("two tokens");
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get<std::string>();
      right = merge[1].get<std::string>();
    } else {
      fail("two tokens");
    }
    const auto l = ids.find(left), r = ids.find(right), merged = ids.find(left + right);
    if (l == ids.end() || r == ids.end() || merged == ids.end()) {
      fail("tokens of the vocabulary whose concatenation is one too");
    }
    bpe.add_merge(l->second, r->second, merged->second);
  }

  void read_added_tokens(const JsonObject& in) {
    const Json& tokens = in.array("added_tokens");
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const JsonObject token(tokens[i], in.origin(), fmt::format("added_tokens[{}].", i));
      const auto id = static_cast<TokenId>(token.integer("id", 0, kMaxToken));
      const std::string content = token.string("content");
      if (content.empty()) token.fail("content", "at least one character");
      for (const char* option : {"single_word", "lstrip", "rstrip"}) {
        if (token.boolean_or(option, false)) token.refuse(option, "false");
      }
      const bool special = token.boolean_or("special", false);
      const auto known = ids.find(content);
      if (known == ids.end()) {
        name(in, content, id);
      } else if (known->second != id) {
        token.fail("id", fmt::format("{}, the id of {} in the vocabulary", known->second, shown(content)));
      }
      entries[static_cast<std::size_t>(id)].special = special;
      (token.boolean_or("normalized", !special) ? added_normalized : added).add(content, id);
    }
  }

  void read_post_processor(const JsonObject& in) {
    const std::string type = in.string("type");
    if (type == "Sequence") {
      const Json& parts = in.array("processors");
      for (std::size_t i = 0; i < parts.size(); ++i) {
        read_post_processor(
            JsonObject(parts[i], in.origin(), fmt::format("post_processor.processors[{}].", i)));
      }
    } else if (type == "TemplateProcessing") {
      read_template(in);
    } else if (type != "ByteLevel") {  // ByteLevel moves offsets, which nothing here has
      in.refuse("type", "\"ByteLevel\", \"TemplateProcessing\" or a \"Sequence\" of these");
    }
  }

  /// "single": special tokens around the text, "A".
  void read_template(const JsonObject& in) {
    const JsonObject special = in.object("special_tokens");
    bool behind = false;
    for (const Json& part : in.array("single")) {
      const JsonObject piece(part, in.origin(), "post_processor.single.");
      if (piece.has("Sequence")) {
        if (behind || piece.object("Sequence").string("id") != "A") in.fail("single", "the text \"A\" once");
        behind = true;
        continue;
      }
      const std::string id = piece.object("SpecialToken").string("id");
      for (const Json& token : special.object(id.c_str()).array("ids")) {
        if (!token.is_number_unsigned() || token.get<std::uint64_t>() >= entries.size()) {
          in.fail("special_tokens", "tokens of the vocabulary");
        }
        (behind ? suffix : prefix).push_back(token.get<TokenId>());
      }
    }
    if (!behind) in.fail("single", "the text \"A\" once");
  }

  /// transformers' tokenizer_config.json says again what goes around a text, and wins.
  void read_tokenizer_config(const JsonObject& in) {
    read_edge(in, "add_bos_token", "bos_token", prefix);
    read_edge(in, "add_eos_token", "eos_token", suffix);
  }

  void read_edge(const JsonObject& in, const char* flag, const char* token_name, std::vector<TokenId>& edge) {
    if (!in.has(flag)) return;
    edge.clear();
    if (!in.boolean(flag)) return;
    const Json* token = in.find(token_name);
    const bool object = token != nullptr && token->is_object();
    const std::string content = object ? in.object(token_name).string("content") : in.string(token_name);
    const auto found = ids.find(content);
    if (found == ids.end()) in.fail(token_name, "a token of tokenizer.json");
    edge.push_back(found->second);
  }

  // ------------------------------------------------------------------------------------ encoding

  void encode_words(std::string_view text, std::vector<TokenId>& out) const {
    for (const std::string_view word : pre_tokenizer.split(text)) {
      if (ignore_merges) {
        const auto whole = words.find(word);
        if (whole != words.end()) {
          out.push_back(whole->second);
          continue;
        }
      }
      bpe.encode(word, out);
    }
  }

  /// Calls `rest` for what lies between the tokens found. `allowed(match)`: whether it counts; a match has
  /// places relative to `text`.
  template <typename Allowed, typename Rest>
  void encode_added(const AddedTokens& tokens, std::string_view text, const Allowed& allowed,
                    std::vector<TokenId>& out, const Rest& rest) const {
    std::size_t done = 0, from = 0;
    while (from < text.size()) {
      const AddedTokens::Match match = tokens.find(text, from);
      if (match.token < 0) break;
      from = match.end;
      if (!allowed(match)) continue;
      if (match.begin > done) rest(text.substr(done, match.begin - done));
      out.push_back(match.token);
      done = match.end;
    }
    if (done < text.size()) rest(text.substr(done));
  }

  /// Walks the added tokens of either kind in a text, from left to right. Each kind's next match is kept
  /// until the walk has passed it, so that a text full of one kind is not searched again and again for the
  /// other: the whole walk is linear.
  class Walk {
   public:
    Walk(const Impl& impl, std::string_view text) : impl_(impl), text_(text) {}
    /// The first at `from` or later, where no earlier call asked for more; those that are not normalized win
    /// where both begin.
    AddedTokens::Match next(std::size_t from) {
      if (!begun_ || exact_.begin < from) exact_ = impl_.added.find(text_, from);
      if (!begun_ || other_.begin < from) other_ = impl_.added_normalized.find(text_, from);
      begun_ = true;
      return exact_.token < 0 || (other_.token >= 0 && other_.begin < exact_.begin) ? other_ : exact_;
    }

   private:
    const Impl& impl_;
    std::string_view text_;
    bool begun_ = false;
    AddedTokens::Match exact_{}, other_{};
  };

  const Entry* entry(TokenId id) const {
    if (id < 0) throw InvalidArgument(fmt::format("token id = {}: expected at least 0", id));
    return static_cast<std::size_t>(id) < entries.size() ? &entries[static_cast<std::size_t>(id)] : nullptr;
  }
};

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::parse(std::string_view tokenizer_json, std::string_view origin) {
  const Json json = parse_json(tokenizer_json, origin);
  auto impl = std::make_unique<Impl>();
  impl->read(JsonObject(json, std::string(origin)));
  return Tokenizer(std::move(impl));
}

Tokenizer Tokenizer::open(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "tokenizer.json";
  Tokenizer out = parse(read_file(path), path.string());
  const std::filesystem::path config = directory / "tokenizer_config.json";
  if (std::filesystem::exists(config)) {
    const Json json = parse_json(read_file(config), config.string());
    out.impl_->read_tokenizer_config(JsonObject(json, config.string()));
  } else if (out.impl_->prefix.empty()) {
    throw InvalidArgument(
        fmt::format("{}: cannot be read; expected it beside tokenizer.json, which does not say whether a "
                    "begin-of-sentence token goes in front of a text",
                    config.string()));
  }
  return out;
}

int Tokenizer::vocab_size() const { return static_cast<int>(impl_->entries.size()); }

namespace {

void check_size(std::size_t bytes) {
  if (bytes > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()) / 3) {
    throw InvalidArgument(fmt::format("text has {} bytes: expected less than 2^31 / 3", bytes));
  }
}

}  // namespace

std::vector<TokenId> Tokenizer::encode(std::string_view text, bool add_special_tokens,
                                       bool allow_special) const {
  check_size(text.size());
  std::string storage;
  const std::string_view valid = replace_invalid_utf8(text, storage);
  std::vector<TokenId> out;
  if (add_special_tokens) out = impl_->prefix;
  const auto allowed = [&](const AddedTokens::Match& match) {
    return allow_special || !impl_->entries[static_cast<std::size_t>(match.token)].special;
  };
  impl_->encode_added(impl_->added, valid, allowed, out, [&](std::string_view rest) {
    impl_->encode_added(impl_->added_normalized, rest, allowed, out,
                        [&](std::string_view plain) { impl_->encode_words(plain, out); });
  });
  if (add_special_tokens) out.insert(out.end(), impl_->suffix.begin(), impl_->suffix.end());
  return out;
}

std::vector<TokenId> Tokenizer::encode_parts(std::span<const TextPart> parts, bool add_special_tokens) const {
  std::string text;
  std::vector<bool> control;  // by byte
  for (const TextPart& part : parts) {
    std::string storage;
    text += replace_invalid_utf8(part.text, storage);
    check_size(text.size());
    control.resize(text.size(), part.control);
  }
  std::vector<TokenId> out;
  if (add_special_tokens) out = impl_->prefix;
  // Between control texts nothing is found, so that a match that is refused can hide none that would not be.
  std::size_t begin = 0;
  const auto words_until = [&](std::size_t end) {
    if (end > begin) impl_->encode_words(std::string_view(text).substr(begin, end - begin), out);
  };
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t from = static_cast<std::size_t>(
        std::find(control.begin() + static_cast<std::ptrdiff_t>(at), control.end(), true) - control.begin());
    const std::size_t to = static_cast<std::size_t>(
        std::find(control.begin() + static_cast<std::ptrdiff_t>(from), control.end(), false) -
        control.begin());
    at = to;
    Impl::Walk walk(*impl_, std::string_view(text).substr(0, to));
    for (std::size_t place = from; place < to;) {
      const AddedTokens::Match match = walk.next(place);
      if (match.token < 0) break;
      words_until(match.begin);
      out.push_back(match.token);
      begin = place = match.end;
    }
  }
  words_until(text.size());
  if (add_special_tokens) out.insert(out.end(), impl_->suffix.begin(), impl_->suffix.end());
  return out;
}

std::string Tokenizer::decode(std::span<const TokenId> ids, bool skip_special) const {
  std::string bytes;
  for (const TokenId id : ids) {
    const Entry* entry = impl_->entry(id);
    if (entry != nullptr && !(skip_special && entry->special)) bytes += entry->bytes;
  }
  std::string storage;
  return std::string(replace_invalid_utf8(bytes, storage));
}

std::string_view Tokenizer::token_bytes(TokenId id) const {
  const Entry* entry = impl_->entry(id);
  return entry == nullptr ? std::string_view() : entry->bytes;
}

bool Tokenizer::is_special(TokenId id) const {
  return id >= 0 && id < vocab_size() && impl_->entries[static_cast<std::size_t>(id)].special;
}

TokenId Tokenizer::token_to_id(std::string_view token) const {
  const auto found = impl_->ids.find(token);
  return found == impl_->ids.end() ? -1 : found->second;
}

std::string Tokenizer::id_to_token(TokenId id) const {
  const Entry* entry = impl_->entry(id);
  return entry == nullptr ? std::string() : entry->spelling;
}

std::string StreamDecoder::push(TokenId id) {
  const std::string_view bytes = tokenizer_->token_bytes(id);
  if (skip_special_ && tokenizer_->is_special(id)) return {};
  pending_ += bytes;
  const std::size_t certain = pending_.size() - incomplete_utf8_suffix(pending_);
  std::string storage;
  std::string out(replace_invalid_utf8(std::string_view(pending_).substr(0, certain), storage));
  pending_.erase(0, certain);
  return out;
}

std::string StreamDecoder::flush() {
  std::string storage;
  std::string out(replace_invalid_utf8(pending_, storage));
  pending_.clear();
  return out;
}

}  // namespace flash_mla::text
