#pragma once

// A sheet of equations. The text of an equation is what is computed, what --explain prints and what the
// documentation shows: there is no second copy of a formula that could differ from the first.
//
// Grammar: numbers, names ([A-Za-z_][A-Za-z0-9_']*), + - * / ^, parentheses, comparisons < <= > >= == (1 or
// 0), and the functions min(a, b), max(a, b), ceil(a), floor(a), if(condition, a, b), and miss(E, m, k) = C(E
// - m, k) / C(E, k), the chance that none of k distinct draws from E is among m given ones.

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace flash_mla::planner {

struct Equation {
  const char* name;
  const char* text;
  const char* unit;
  const char* meaning;
  int article_number = 0;  ///< number of the formula in the article, 0 if it is not one of the 28
};

class Sheet {
 public:
  /// `inputs` are the names a caller sets; every other name must be defined by an equation above its use.
  Sheet(std::vector<std::string> inputs, std::vector<Equation> equations);

  /// Index of an input or an equation's value. Throws std::logic_error for a name the sheet does not have.
  int slot(std::string_view name) const;
  bool has(std::string_view name) const { return slots_.find(name) != slots_.end(); }
  int num_slots() const { return static_cast<int>(slots_.size()); }
  int num_inputs() const { return static_cast<int>(inputs_.size()); }
  const std::vector<std::string>& inputs() const { return inputs_; }
  const std::vector<Equation>& equations() const { return equations_; }

  /// Fills the slots of all equations from the slots of the inputs. Throws InvalidArgument naming the
  /// equation when a value is not finite.
  void evaluate(std::vector<double>& values) const;

  /// The value of one more expression over the sheet's names.
  double evaluate(std::string_view text, const std::vector<double>& values) const;

  /// `text` with every name replaced by its value, written so that reading it back gives the same double.
  std::string substitute(std::string_view text, const std::vector<double>& values) const;

 private:
  struct Op {
    enum Kind : unsigned char {
      kPush,
      kLoad,
      kAdd,
      kSub,
      kMul,
      kDiv,
      kPow,
      kNeg,
      kLess,
      kLessEqual,
      kGreater,
      kGreaterEqual,
      kEqual,
      kMin,
      kMax,
      kCeil,
      kFloor,
      kIf,
      kMiss
    } kind;
    int slot;
    double value;
  };
  struct Program {
    std::vector<Op> ops;
    int target = -1;
  };
  class Parser;

  Program compile(std::string_view text) const;
  static double run(const Program& program, const std::vector<double>& values);

  std::vector<std::string> inputs_;
  std::vector<Equation> equations_;
  std::map<std::string, int, std::less<>> slots_;
  std::vector<Program> programs_;
};

}  // namespace flash_mla::planner
