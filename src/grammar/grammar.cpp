#include "grammar/grammar.h"

#include <fmt/format.h>
#include <xgrammar/xgrammar.h>

#include <list>
#include <mutex>
#include <optional>
#include <string_view>
#include <utility>

#include "flash_mla/error.h"
#include "grammar/automaton.h"
#include "grammar/gate.h"
#include "grammar/schema_check.h"
#include "grammar/source_check.h"
#include "grammar/structural_tag.h"
#include "grammar/xgrammar_log.h"

namespace flash_mla::grammar {
namespace {

using Kind = TextFormat::Kind;

class XGrammarMatcher : public Matcher {
 public:
  XGrammarMatcher(const xgrammar::CompiledGrammar& grammar, const std::vector<std::int32_t>& ends)
      : matcher_(grammar,
                 ends.empty() ? std::nullopt : std::optional(std::vector<int>(ends.begin(), ends.end())),
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
  bool accept_text(std::string_view bytes) override { return matcher_.AcceptString(std::string(bytes)); }
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
  std::size_t num_bytes() const override { return compiled_.MemorySizeBytes(); }

 private:
  xgrammar::CompiledGrammar compiled_;
};

xgrammar::Grammar json_grammar(const std::string& schema) {
  return xgrammar::Grammar::FromJSONSchema(schema, /*any_whitespace=*/true, std::nullopt, std::nullopt,
                                           /*strict_mode=*/true, kMaxJsonBlanks);
}

// What is no automaton of ours (regex_automaton): too large, or not to be read.
xgrammar::Grammar regex_grammar(const std::string& regex) {
  try {
    return xgrammar::Grammar::FromEBNF(fmt::format("root ::= Regex({})", grammar_literal(regex)));
  } catch (const std::exception&) {  // the automaton knows less than the rules
    return xgrammar::Grammar::FromRegex(regex);
  }
}

xgrammar::Grammar tagged_grammar(const TextFormat& format, const xgrammar::TokenizerInfo& tokens) {
  auto out = xgrammar::Grammar::FromStructuralTag(structural_tag(format), tokens);
  if (auto* grammar = std::get_if<xgrammar::Grammar>(&out)) return *grammar;
  throw InvalidArgument(std::visit([](const auto& e) { return std::string(e.what()); },
                                   std::get<xgrammar::StructuralTagError>(out)));
}

xgrammar::Grammar grammar_of(const TextFormat& format, const xgrammar::TokenizerInfo& tokens) {
  if (!format.calls.functions.empty()) return tagged_grammar(format, tokens);
  switch (format.kind) {
    case Kind::kJsonObject:
      return json_grammar(R"({"type": "object", "additionalProperties": true})");
    case Kind::kJsonSchema:
      return json_grammar(checked_schema(format.source));
    case Kind::kRegex:
      return regex_grammar(format.source);
    case Kind::kGrammar:
      return xgrammar::Grammar::FromEBNF(format.source);
    case Kind::kChoice:
      return xgrammar::Grammar::FromEBNF(alternatives(format.choices));
    case Kind::kFree:
      break;
  }
  throw InvalidArgument("the format of a text: expected one that is not free");
}

const char* name_of(const TextFormat& format) {
  switch (format.kind) {
    case Kind::kFree:
      return format.is_free() ? "format" : "calls";
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
  std::string key = fmt::format("{}", static_cast<int>(format.kind));
  const auto add = [&](std::string_view text) { key += fmt::format(":{}:{}", text.size(), text); };
  add(format.source);
  for (const std::string& choice : format.choices) add(choice);
  const CallNotation& calls = format.calls;
  key += fmt::format("|{}{}", static_cast<int>(calls.arguments), calls.parallel);
  for (const auto& function : calls.functions) {
    add(function.begin);
    add(function.parameters);
  }
  key += '|';
  for (const std::string* text :
       {&calls.section_begin, &calls.separator, &calls.end, &calls.section_end, &calls.number_end,
        &calls.trigger, &calls.opened, &format.begins_behind, &format.opened_by}) {
    add(*text);
  }
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
  void keep(std::string key, std::shared_ptr<const Grammar> grammar) {
    const std::lock_guard lock(mutex);
    kept.emplace_front(std::move(key), std::move(grammar));
    if (kept.size() > kMaxKept) kept.pop_back();
  }

  // Made when it is first asked for: most engines never are. Masks are computed where a text comes to, not for all
  // of a grammar at once, so that a large one costs no more than its texts.
  xgrammar::GrammarCompiler& compiler() {
    std::call_once(made, [this] {
      tokens.emplace(vocabulary.bytes, xgrammar::VocabType::RAW, vocabulary.size,
                     std::vector<std::int32_t>(vocabulary.ends));
      engine.emplace(*tokens, /*max_threads=*/1, /*cache_enabled=*/false, /*max_memory_bytes=*/-1,
                     /*enable_dynamic_compilation=*/true);
      bytes = std::make_shared<const std::vector<std::string>>(std::move(vocabulary.bytes));
    });
    return *engine;
  }

  std::shared_ptr<const Grammar> make(const xgrammar::Grammar& grammar) {
    return std::make_shared<XGrammarGrammar>(engine->CompileGrammar(grammar));
  }

  // A regular expression as an automaton of its own: a group with a count is a rule to XGrammar, and which tokens may
  // follow depends on where in its rules a text stands, 12 to 19 ms for every token at a vocabulary of 129,280. Null: it
  // cannot be had.
  std::shared_ptr<const Grammar> automaton(const TextFormat& format, const RegexSurroundings& around = {}) {
    if (format.kind != Kind::kRegex || !format.calls.functions.empty()) return nullptr;
    std::optional<Nfa> nfa = regex_nfa(format.source, around);
    if (!nfa) return nullptr;
    std::call_once(ordered, [this] { order = std::make_shared<const TokenOrder>(bytes); });
    if (std::optional<ByteAutomaton> found = determinize(*nfa))
      return make_automaton_grammar(std::move(*found), order);
    std::shared_ptr<const Grammar> out = make_automaton_grammar(std::move(*nfa), order);
    return is_quick(*out, static_cast<std::size_t>(vocabulary.size)) ? out : nullptr;
  }

  // Whether the first mask takes no longer than others may be made to wait; if not, XGrammar's rules may do.
  static bool is_quick(const Grammar& grammar, std::size_t vocab_size) {
    std::vector<std::uint32_t> mask((vocab_size + 31) / 32);
    try {
      grammar.matcher({})->allowed(mask);
    } catch (const TooSlow&) {
      return false;
    }
    return true;
  }

  std::shared_ptr<const Grammar> make(const TextFormat& format) {
    compiler();
    if (format.begins_behind.empty()) {
      if (std::shared_ptr<const Grammar> found = automaton(format)) return found;
    } else if (std::shared_ptr<const Grammar> behind = automaton(format, {Gate::kMaxLineBreaks, "", 0})) {
      Gate gate{format.begins_behind, format.opened_by, std::move(behind), nullptr, bytes};
      if (!format.opened_by.empty())
        gate.first = automaton(format, {Gate::kMaxLineBreaks, format.opened_by, 2});
      if (format.opened_by.empty() || gate.first) return make_gated(std::move(gate));
    }
    const xgrammar::Grammar text = grammar_of(format, *tokens);
    if (format.begins_behind.empty()) return make(text);
    const auto breaks =
        xgrammar::Grammar::FromEBNF(fmt::format("root ::= [\\n]{{0,{}}}", Gate::kMaxLineBreaks));
    const auto behind = xgrammar::Grammar::Concat({breaks, text});
    Gate gate{format.begins_behind, format.opened_by, make(behind), nullptr, bytes};
    if (!format.opened_by.empty()) {
      const auto opening = xgrammar::Grammar::FromEBNF(
          fmt::format("root ::= [ \\n]{{0,2}} {}", grammar_literal(format.opened_by)));
      gate.first = make(xgrammar::Grammar::Union({behind, opening}));
    }
    return make_gated(std::move(gate));
  }

  Vocabulary vocabulary;
  std::once_flag made;
  std::optional<xgrammar::TokenizerInfo> tokens;
  std::optional<xgrammar::GrammarCompiler> engine;
  std::shared_ptr<const std::vector<std::string>> bytes;  // by token
  std::once_flag ordered;
  std::shared_ptr<const TokenOrder> order;                                 // of them
  std::mutex mutex;                                                        // of what follows
  std::list<std::pair<std::string, std::shared_ptr<const Grammar>>> kept;  // the last used first
};

Compiler::Compiler(Vocabulary vocabulary) : impl_(std::make_unique<Impl>(std::move(vocabulary))) {}
Compiler::~Compiler() = default;

std::shared_ptr<const Grammar> Compiler::compile(const TextFormat& format) {
  check_source(format);
  std::string key = key_of(format);
  if (std::shared_ptr<const Grammar> found = impl_->find(key)) return found;
  const Warnings warnings;
  std::shared_ptr<const Grammar> out;
  try {
    out = impl_->make(format);
  } catch (const InvalidArgument&) {
    throw;
  } catch (const Unsupported&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& e) {
    throw InvalidArgument(fmt::format("{}: {}", name_of(format), plain(e.what())));
  }
  if (!warnings.messages().empty()) {
    throw Unsupported(fmt::format("{} is not supported: {}", name_of(format), warnings.messages().front()));
  }
  impl_->keep(std::move(key), out);
  return out;
}

}  // namespace flash_mla::grammar
