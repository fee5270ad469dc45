#include "planner/sheet.h"

#include <fmt/format.h>

#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <stdexcept>

#include "flash_mla/error.h"
#include "planner/number.h"

namespace flash_mla::planner {
namespace {

constexpr int kMaxDepth = 32;

bool is_name_start(char c) { return std::isalpha(static_cast<unsigned char>(c)) || c == '_'; }
bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '\''; }

std::string_view read_name(std::string_view text, std::size_t at) {
  std::size_t end = at;
  while (end < text.size() && is_name(text[end])) ++end;
  return text.substr(at, end - at);
}

/// Length of the number that starts `text`; its value goes to `value`.
std::size_t read_number(std::string_view text, double& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() ? static_cast<std::size_t>(end - text.data()) : 0;
}

double miss(double pool, double marked, double draws) {
  double p = 1;
  for (int i = 0; i < static_cast<int>(draws); ++i) p *= std::max(0.0, pool - marked - i) / (pool - i);
  return p;
}

}  // namespace

/// Recursive descent over one expression; writes operations in postfix order.
class Sheet::Parser {
 public:
  Parser(const Sheet& sheet, std::string_view text, Program& out) : sheet_(sheet), text_(text), out_(out) {}

  void parse() {
    comparison();
    skip_space();
    if (at_ != text_.size()) fail("unexpected text");
  }

 private:
  [[noreturn]] void fail(const char* why) const {
    throw std::logic_error(fmt::format("equation \"{}\": {} at character {}", text_, why, at_));
  }
  void skip_space() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
  }
  bool take(std::string_view token) {
    skip_space();
    if (text_.substr(at_, token.size()) != token) return false;
    at_ += token.size();
    return true;
  }
  void emit(Op::Kind kind) { out_.ops.push_back({kind, 0, 0}); }

  void comparison() {
    sum();
    static constexpr std::array<std::pair<const char*, Op::Kind>, 5> kTokens = {{{"<=", Op::kLessEqual},
                                                                                 {">=", Op::kGreaterEqual},
                                                                                 {"==", Op::kEqual},
                                                                                 {"<", Op::kLess},
                                                                                 {">", Op::kGreater}}};
    for (const auto& [token, kind] : kTokens) {
      if (take(token)) {
        sum();
        emit(kind);
        return;
      }
    }
  }
  void sum() {
    product();
    for (;;) {
      if (take("+")) {
        product();
        emit(Op::kAdd);
      } else if (take("-")) {
        product();
        emit(Op::kSub);
      } else {
        return;
      }
    }
  }
  void product() {
    power();
    for (;;) {
      if (take("*")) {
        power();
        emit(Op::kMul);
      } else if (take("/")) {
        power();
        emit(Op::kDiv);
      } else {
        return;
      }
    }
  }
  void power() {
    if (take("-")) {
      power();
      emit(Op::kNeg);
      return;
    }
    atom();
    if (take("^")) {
      power();
      emit(Op::kPow);
    }
  }
  void arguments(int count) {
    if (!take("(")) fail("expected (");
    for (int i = 0; i < count; ++i) {
      if (i > 0 && !take(",")) fail("expected ,");
      comparison();
    }
    if (!take(")")) fail("expected )");
  }
  void atom() {
    skip_space();
    if (take("(")) {
      comparison();
      if (!take(")")) fail("expected )");
      return;
    }
    if (at_ < text_.size() && is_name_start(text_[at_])) {
      const std::string_view name = read_name(text_, at_);
      at_ += name.size();
      struct Function {
        const char* name;
        int arity;
        Op::Kind kind;
      };
      static constexpr std::array<Function, 6> kFunctions = {{{"min", 2, Op::kMin},
                                                              {"max", 2, Op::kMax},
                                                              {"ceil", 1, Op::kCeil},
                                                              {"floor", 1, Op::kFloor},
                                                              {"if", 3, Op::kIf},
                                                              {"miss", 3, Op::kMiss}}};
      for (const Function& f : kFunctions) {
        if (name == f.name) {
          arguments(f.arity);
          emit(f.kind);
          return;
        }
      }
      out_.ops.push_back({Op::kLoad, sheet_.slot(name), 0});
      return;
    }
    double value = 0;
    const std::size_t length = read_number(text_.substr(at_), value);
    if (length == 0) fail("expected a number, a name or (");
    at_ += length;
    out_.ops.push_back({Op::kPush, 0, value});
  }

  const Sheet& sheet_;
  std::string_view text_;
  Program& out_;
  std::size_t at_ = 0;
};

Sheet::Sheet(std::vector<std::string> inputs, std::vector<Equation> equations)
    : inputs_(std::move(inputs)), equations_(std::move(equations)) {
  for (const std::string& name : inputs_) slots_.emplace(name, num_slots());
  for (const Equation& e : equations_) {
    Program program = compile(e.text);
    program.target = num_slots();
    if (!slots_.emplace(e.name, program.target).second) {
      throw std::logic_error(fmt::format("equation {} is defined twice", e.name));
    }
    programs_.push_back(std::move(program));
  }
}

int Sheet::slot(std::string_view name) const {
  const auto found = slots_.find(name);
  if (found == slots_.end()) throw std::logic_error(fmt::format("the sheet has no name \"{}\"", name));
  return found->second;
}

Sheet::Program Sheet::compile(std::string_view text) const {
  Program program;
  Parser(*this, text, program).parse();
  return program;
}

double Sheet::run(const Program& program, const std::vector<double>& values) {
  std::array<double, kMaxDepth> stack;
  int top = -1;
  for (const Op& op : program.ops) {
    if (op.kind == Op::kPush || op.kind == Op::kLoad) {
      if (top + 1 == kMaxDepth) throw std::logic_error("an equation nests too deeply");
      stack[++top] = op.kind == Op::kPush ? op.value : values[op.slot];
      continue;
    }
    double& a = stack[top > 0 ? top - 1 : 0];  // left operand, and where a binary result goes
    const double b = stack[top];
    switch (op.kind) {
      case Op::kAdd:
        a += b;
        --top;
        break;
      case Op::kSub:
        a -= b;
        --top;
        break;
      case Op::kMul:
        a *= b;
        --top;
        break;
      case Op::kDiv:
        a /= b;
        --top;
        break;
      case Op::kPow:
        a = std::pow(a, b);
        --top;
        break;
      case Op::kLess:
        a = a < b;
        --top;
        break;
      case Op::kLessEqual:
        a = a <= b;
        --top;
        break;
      case Op::kGreater:
        a = a > b;
        --top;
        break;
      case Op::kGreaterEqual:
        a = a >= b;
        --top;
        break;
      case Op::kEqual:
        a = a == b;
        --top;
        break;
      case Op::kMin:
        a = std::min(a, b);
        --top;
        break;
      case Op::kMax:
        a = std::max(a, b);
        --top;
        break;
      case Op::kNeg:
        stack[top] = -b;
        break;
      case Op::kCeil:
        stack[top] = std::ceil(b);
        break;
      case Op::kFloor:
        stack[top] = std::floor(b);
        break;
      case Op::kIf:
        stack[top - 2] = stack[top - 2] != 0 ? a : b;
        top -= 2;
        break;
      case Op::kMiss:
        stack[top - 2] = miss(stack[top - 2], a, b);
        top -= 2;
        break;
      case Op::kPush:
      case Op::kLoad:
        break;
    }
  }
  return stack[0];
}

void Sheet::evaluate(std::vector<double>& values) const {
  for (std::size_t i = 0; i < programs_.size(); ++i) {
    const double value = run(programs_[i], values);
    if (!std::isfinite(value)) {
      throw InvalidArgument(fmt::format("{} = {} has no finite value: {}", equations_[i].name,
                                        equations_[i].text, substitute(equations_[i].text, values)));
    }
    values[programs_[i].target] = value;
  }
}

double Sheet::evaluate(std::string_view text, const std::vector<double>& values) const {
  return run(compile(text), values);
}

std::string Sheet::substitute(std::string_view text, const std::vector<double>& values) const {
  std::string out;
  for (std::size_t i = 0; i < text.size();) {
    if (is_name_start(text[i])) {
      const std::string_view name = read_name(text, i);
      const auto found = slots_.find(name);
      if (found != slots_.end()) {
        const double v = values[found->second];
        out += v < 0 ? fmt::format("({})", shortest(v)) : shortest(v);
      } else {
        out += name;
      }
      i += name.size();
    } else if (std::isdigit(static_cast<unsigned char>(text[i]))) {
      double value = 0;
      const std::size_t length = read_number(text.substr(i), value);
      out += text.substr(i, length);
      i += length;
    } else {
      out += text[i++];
    }
  }
  return out;
}

}  // namespace flash_mla::planner
