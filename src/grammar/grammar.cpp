#include "grammar/grammar.h"

#include <fmt/format.h>
#include <xgrammar/xgrammar.h>

#include <list>
#include <mutex>
#include <optional>
#include <string_view>
#include <utility>

#include "flash_mla/error.h"
#include "grammar/schema_check.h"
#include "grammar/source_check.h"
#include "grammar/xgrammar_log.h"

namespace flash_mla::grammar {
namespace {

using Kind = TextFormat::Kind;

// White space between the parts of a JSON text. Without a bound a model that likes blanks never comes to its end.
constexpr int kMaxJsonBlanks = 16;

class XGrammarMatcher : public Matcher {
 public:
  XGrammarMatcher(const xgrammar::CompiledGrammar& grammar, const std::vector<std::int32_t>& ends)
      : matcher_(grammar, std::vector<int>(ends.begin(), ends.end()),
                 /*terminate_without_stop_token=*/ends.empty()),
        ends_(ends) {}

  void allowed(std::span<std::uint32_t> mask) override {
    const auto words = static_cast<std::int64_t>(mask.size());
    std::int64_t shape[] = {words}, strides[] = {1};
    DLTensor tensor{mask.data(), {kDLCPU, 0}, 1, xgrammar::GetBitmaskDLType(), shape, strides, 0};
    matcher_.FillNextTokenBitmask(&tensor);
    // A stop token of the request may have a text that the grammar would take.
    if (matcher_.IsCompleted()) return;
    for (const std::int32_t end : ends_) {
      if (static_cast<std::size_t>(end) / 32 < mask.size())
        mask[static_cast<std::size_t>(end) / 32] &= ~(1U << (static_cast<unsigned>(end) % 32));
    }
  }
  bool accept(std::int32_t token) override { return matcher_.AcceptToken(token); }
  bool ended() const override { return matcher_.IsTerminated(); }

 private:
  xgrammar::GrammarMatcher matcher_;
  std::vector<std::int32_t> ends_;
};

class XGrammarGrammar : public Grammar {
 public:
  explicit XGrammarGrammar(xgrammar::CompiledGrammar compiled) : compiled_(std::move(compiled)) {}
  std::unique_ptr<Matcher> matcher(std::vector<std::int32_t> ends) const override {
    return std::make_unique<XGrammarMatcher>(compiled_, ends);
  }
  std::size_t num_bytes() const { return compiled_.MemorySizeBytes(); }

 private:
  xgrammar::CompiledGrammar compiled_;
};

xgrammar::Grammar json_grammar(const std::string& schema) {
  return xgrammar::Grammar::FromJSONSchema(schema, /*any_whitespace=*/true, std::nullopt, std::nullopt,
                                           /*strict_mode=*/true, kMaxJsonBlanks);
}

// One of them, in the grammar's own notation: every byte that is not plain as an escape.
std::string alternatives(const std::vector<std::string>& choices) {
  std::string out = "root ::= ";
  for (std::size_t i = 0; i < choices.size(); ++i) {
    if (i > 0) out += " | ";
    out += '"';
    for (const char c : choices[i]) {
      if (c == '"' || c == '\\') {
        out += '\\';
        out += c;
      } else if (c == '\n') {
        out += "\\n";
      } else if (c == '\r') {
        out += "\\r";
      } else if (c == '\t') {
        out += "\\t";
      } else if (static_cast<unsigned char>(c) < ' ') {
        throw Unsupported("choice is not supported: control characters in it");
      } else {
        out += c;
      }
    }
    out += '"';
  }
  return out;
}

xgrammar::Grammar grammar_of(const TextFormat& format) {
  switch (format.kind) {
    case Kind::kJsonObject:
      return json_grammar(R"({"type": "object", "additionalProperties": true})");
    case Kind::kJsonSchema:
      return json_grammar(checked_schema(format.source));
    case Kind::kRegex:
      return xgrammar::Grammar::FromRegex(format.source);
    case Kind::kGrammar:
      return xgrammar::Grammar::FromEBNF(format.source);
    case Kind::kChoice:
      return xgrammar::Grammar::FromEBNF(alternatives(format.choices));
    case Kind::kFree:
      break;
  }
  throw InvalidArgument("the format of a text: expected one that is not free");
}

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kFree:
      return "format";
    case Kind::kJsonObject:
      return "json_object";
    case Kind::kJsonSchema:
      return "json_schema";
    case Kind::kRegex:
      return "regex";
    case Kind::kGrammar:
      return "grammar";
    case Kind::kChoice:
      return "choice";
  }
  return "format";
}

// Without the time and the place in a file that XGrammar puts in front.
std::string plain(std::string_view message) {
  if (message.starts_with('[')) {
    const std::size_t place = message.find("] ");
    const std::size_t colon = place == std::string_view::npos ? place : message.find(": ", place);
    if (colon != std::string_view::npos) message.remove_prefix(colon + 2);
  }
  while (message.ends_with('\n')) message.remove_suffix(1);
  return std::string(message);
}

std::string key_of(const TextFormat& format) {
  std::string key = fmt::format("{}:{}", static_cast<int>(format.kind), format.source);
  for (const std::string& choice : format.choices) key += fmt::format("{}:{}", choice.size(), choice);
  return key;
}

}  // namespace

struct Compiler::Impl {
  static constexpr std::size_t kMaxKept = 64;
  // A grammar grows with the places that its texts come to: one that has grown larger is made anew.
  static constexpr std::size_t kMaxKeptBytes = 16 << 20;

  explicit Impl(Vocabulary v) : vocabulary(std::move(v)) {}

  std::shared_ptr<const Grammar> find(const std::string& key) {
    const std::lock_guard lock(mutex);
    for (auto it = kept.begin(); it != kept.end(); ++it) {
      if (it->first != key) continue;
      if (it->second->num_bytes() > kMaxKeptBytes) {
        kept.erase(it);
        return nullptr;
      }
      kept.splice(kept.begin(), kept, it);
      return it->second;
    }
    return nullptr;
  }
  void keep(std::string key, std::shared_ptr<const XGrammarGrammar> grammar) {
    const std::lock_guard lock(mutex);
    kept.emplace_front(std::move(key), std::move(grammar));
    if (kept.size() > kMaxKept) kept.pop_back();
  }

  // Made when it is first asked for: most engines never are. Masks are computed where a text comes to, not for all
  // of a grammar at once, so that a large one costs no more than its texts.
  xgrammar::GrammarCompiler& compiler() {
    std::call_once(made, [this] {
      const xgrammar::TokenizerInfo tokens(vocabulary.bytes, xgrammar::VocabType::RAW, vocabulary.size,
                                           std::vector<std::int32_t>(vocabulary.ends));
      engine.emplace(tokens, /*max_threads=*/1, /*cache_enabled=*/false, /*max_memory_bytes=*/-1,
                     /*enable_dynamic_compilation=*/true);
      vocabulary.bytes = {};
    });
    return *engine;
  }

  Vocabulary vocabulary;
  std::once_flag made;
  std::optional<xgrammar::GrammarCompiler> engine;
  std::mutex mutex;                                                                // of what follows
  std::list<std::pair<std::string, std::shared_ptr<const XGrammarGrammar>>> kept;  // the last used first
};

Compiler::Compiler(Vocabulary vocabulary) : impl_(std::make_unique<Impl>(std::move(vocabulary))) {}
Compiler::~Compiler() = default;

std::shared_ptr<const Grammar> Compiler::compile(const TextFormat& format) {
  check_source(format);
  std::string key = key_of(format);
  if (std::shared_ptr<const Grammar> found = impl_->find(key)) return found;
  const Warnings warnings;
  std::shared_ptr<const XGrammarGrammar> out;
  try {
    out = std::make_shared<XGrammarGrammar>(impl_->compiler().CompileGrammar(grammar_of(format)));
  } catch (const InvalidArgument&) {
    throw;
  } catch (const Unsupported&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& e) {
    throw InvalidArgument(fmt::format("{}: {}", name_of(format.kind), plain(e.what())));
  }
  if (!warnings.messages().empty()) {
    throw Unsupported(
        fmt::format("{} is not supported: {}", name_of(format.kind), warnings.messages().front()));
  }
  impl_->keep(std::move(key), out);
  return out;
}

}  // namespace flash_mla::grammar
