#include "grammar/gate.h"

#include <algorithm>
#include <limits>
#include <string_view>
#include <utility>

namespace flash_mla::grammar {
namespace {

constexpr std::string_view kWhiteSpace = " \n\r\t";

void clear(std::span<std::uint32_t> mask, std::int32_t token) {
  const auto t = static_cast<std::size_t>(token);
  if (token >= 0 && t / 32 < mask.size()) mask[t / 32] &= ~(1U << (t % 32));
}

// The longest end of `text` that begins `marker` and is not all of it.
std::string beginning_at_end(std::string_view text, std::string_view marker) {
  for (std::size_t n = std::min(text.size(), marker.size() - 1); n > 0; --n) {
    if (marker.starts_with(text.substr(text.size() - n))) return std::string(text.substr(text.size() - n));
  }
  return {};
}

/// The gate, and which tokens must not come where.
class GatedGrammar : public Grammar, public std::enable_shared_from_this<GatedGrammar> {
 public:
  explicit GatedGrammar(Gate gate) : gate_(std::move(gate)) {
    for (std::size_t token = 0; token < gate_.bytes->size(); ++token) {
      if (leaps("", (*gate_.bytes)[token])) leaping_.push_back(static_cast<std::int32_t>(token));
    }
  }
  std::unique_ptr<Matcher> matcher(std::vector<std::int32_t> ends) const override;

  std::size_t num_bytes() const override {
    return gate_.behind->num_bytes() + (gate_.first ? gate_.first->num_bytes() : 0);
  }

  const Gate& gate() const { return gate_; }
  std::string_view bytes(std::int32_t token) const {
    const auto t = static_cast<std::size_t>(token);
    return token >= 0 && t < gate_.bytes->size() ? std::string_view((*gate_.bytes)[t]) : std::string_view();
  }
  /// Excludes tokens that, behind `tail`, go on behind the gate with what nobody has looked at.
  void exclude_leaping(std::string_view tail, std::span<std::uint32_t> mask) const {
    if (tail.empty()) {
      for (const std::int32_t token : leaping_) clear(mask, token);
      return;
    }
    for (std::size_t token = 0; token < gate_.bytes->size(); ++token) {
      if (leaps(tail, (*gate_.bytes)[token])) clear(mask, static_cast<std::int32_t>(token));
    }
  }

 private:
  bool leaps(std::string_view tail, std::string_view bytes) const {
    const std::string text = std::string(tail) + std::string(bytes);
    const std::size_t at = text.find(gate_.begins_behind);
    if (at == text.npos) return false;
    const std::string_view rest = std::string_view(text).substr(at + gate_.begins_behind.size());
    return rest.size() > Gate::kMaxLineBreaks || rest.find_first_not_of('\n') != rest.npos;
  }

  Gate gate_;
  std::vector<std::int32_t> leaping_;  // with nothing before them
};

class GatedMatcher : public Matcher {
 public:
  GatedMatcher(std::shared_ptr<const GatedGrammar> grammar, std::vector<std::int32_t> ends)
      : grammar_(std::move(grammar)), ends_(std::move(ends)) {
    if (grammar_->gate().first == nullptr) return;
    state_ = State::kFirst;
    format_ = grammar_->gate().first->matcher(ends_);
  }

  void allowed(std::span<std::uint32_t> mask) override {
    if (state_ != State::kFree) return format_->allowed(mask);
    std::ranges::fill(mask, std::numeric_limits<std::uint32_t>::max());
    // A text that ended here would not be of the format.
    for (const std::int32_t end : ends_) clear(mask, end);
    grammar_->exclude_leaping(text_, mask);
  }

  bool accept(std::int32_t token) override {
    if (state_ != State::kFree) {
      if (!format_->accept(token)) return false;
      look(grammar_->bytes(token));
      return true;
    }
    return std::ranges::find(ends_, token) == ends_.end() && pass(grammar_->bytes(token));
  }

  bool accept_text(std::string_view bytes) override {
    if (state_ == State::kFree) return pass(bytes);
    if (!format_->accept_text(bytes)) return false;
    look(bytes);
    return true;
  }

  bool ended() const override { return state_ != State::kFree && format_->ended(); }

 private:
  enum class State {
    kFree,    // before the gate; text_: what could be its beginning
    kFirst,   // the text may still begin with opened_by; text_: all of it
    kFormat,  // behind the gate
  };

  bool pass(std::string_view bytes) {
    const std::string& marker = grammar_->gate().begins_behind;
    text_ += bytes;
    const std::size_t at = text_.find(marker);
    if (at == std::string::npos) {
      text_ = beginning_at_end(text_, marker);
      return true;
    }
    state_ = State::kFormat;
    format_ = grammar_->gate().behind->matcher(ends_);
    const std::string rest = text_.substr(at + marker.size());
    return rest.empty() || format_->accept_text(rest);
  }

  void look(std::string_view bytes) {
    if (state_ != State::kFirst) return;
    text_ += bytes;
    const std::string& marker = grammar_->gate().opened_by;
    const std::string begun = text_.substr(std::min(text_.find_first_not_of(kWhiteSpace), text_.size()));
    if (begun == marker) {
      state_ = State::kFree;
      text_.clear();
    } else if (!marker.starts_with(begun)) {
      state_ = State::kFormat;
    }
  }

  std::shared_ptr<const GatedGrammar> grammar_;
  std::vector<std::int32_t> ends_;
  State state_ = State::kFree;
  std::string text_;
  std::unique_ptr<Matcher> format_;  // null before the gate
};

std::unique_ptr<Matcher> GatedGrammar::matcher(std::vector<std::int32_t> ends) const {
  return std::make_unique<GatedMatcher>(shared_from_this(), std::move(ends));
}

}  // namespace

std::shared_ptr<const Grammar> make_gated(Gate gate) {
  return std::make_shared<const GatedGrammar>(std::move(gate));
}

}  // namespace flash_mla::grammar
