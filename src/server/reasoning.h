#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace flash_mla::server {

/// Splits what a model writes into its reasoning, from <think> to </think>, and its answer. Line breaks beside the tags
/// belong to the tags. Whatever pieces the text comes in, the parts are the same, and none has a half of a tag.
class ReasoningSplitter {
 public:
  struct Parts {
    std::string reasoning, content;
  };
  enum class Begin {
    kUndecided,  ///< reasoning if the text begins with <think>
    kReasoning,  ///< the prompt has opened it
    kContent,    ///< there is none
  };

  /// `also_ends`: what else ends the reasoning, and is part of the answer. Empty: nothing.
  explicit ReasoningSplitter(Begin begin, std::string_view also_ends = {});

  Parts push(std::string_view text);
  /// What was held back: the text ends here.
  Parts finish();
  /// Whether what has been decided so far ends within the reasoning.
  bool in_reasoning() const { return state_ == State::kReasoning || state_ == State::kReasoningBegins; }

 private:
  enum class State { kUndecided, kReasoningBegins, kReasoning, kContentBegins, kContent };
  bool step(Parts& out);
  bool begin();
  bool begin_reasoning();
  bool reason(Parts& out);

  State state_;
  std::string also_ends_;
  std::string held_;
};

/// Counts the tokens of an answer's reasoning, tags not among them.
class ReasoningCounter {
 public:
  ReasoningCounter(ReasoningSplitter::Begin begin, std::string_view also_ends)
      : splitter_(begin, also_ends) {}
  /// `bytes`: of the next token.
  void push(std::string_view bytes);
  std::int64_t count() const { return count_; }

 private:
  ReasoningSplitter splitter_;
  std::int64_t count_ = 0;
};

}  // namespace flash_mla::server
