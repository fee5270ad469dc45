#include "text/jinja/expression_parser.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>

namespace flash_mla::text::jinja {

using Kind = Expression::Kind;

namespace {

constexpr int kMaxDepth = 50;   // of expressions within each other
constexpr int kMaxChain = 100;  // of operators one after another

Value integer_value(const Token& token) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(token.text.data(), token.text.data() + token.text.size(), value);
  if (error != std::errc())
    throw SyntaxProblem{token.line, fmt::format("the number {}; expected less than 2^63", token.text)};
  return value;
}

Value float_value(const Token& token) {
  double value = 0;
  const auto [end, error] = std::from_chars(token.text.data(), token.text.data() + token.text.size(), value);
  if (error != std::errc()) throw SyntaxProblem{token.line, fmt::format("the number {}", token.text)};
  return value;
}

}  // namespace

/// Counts how deep the parser is, so that no input can exhaust the stack.
struct ExpressionParser::Deeper {
  explicit Deeper(ExpressionParser& owner) : parser(owner) {
    if (++parser.depth_ > kMaxDepth)
      parser.fail(fmt::format("expressions nested more than {} deep", kMaxDepth));
  }
  ~Deeper() { --parser.depth_; }
  ExpressionParser& parser;
};

ExpressionParser::ExpressionParser(std::vector<Token> tokens, Program& program)
    : tokens_(std::move(tokens)), program_(program) {
  for (std::size_t i = 2; i < tokens_.size(); ++i) {
    if (tokens_[i - 2].kind == Token::Kind::kBlockBegin && tokens_[i - 1].text == "macro")
      macros_.insert(tokens_[i].text);
  }
}

bool ExpressionParser::skip_operator(std::string_view text) {
  const bool found = is_operator(text);
  if (found) next();
  return found;
}

bool ExpressionParser::skip_name(std::string_view text) {
  const bool found = is_name(text);
  if (found) next();
  return found;
}

void ExpressionParser::expect_operator(std::string_view text) {
  if (!skip_operator(text)) fail(fmt::format("\"{}\" where \"{}\" is expected", token().text, text));
}

std::string ExpressionParser::expect_name() {
  if (!is(Token::Kind::kName)) fail(fmt::format("\"{}\" where a name is expected", token().text));
  return next().text;
}

Symbol ExpressionParser::symbol(const std::string& name) {
  const auto [found, added] = symbols_.try_emplace(name, static_cast<Symbol>(program_.names.size()));
  if (added) program_.names.push_back(name);
  return found->second;
}

ExpressionParser::Pointer ExpressionParser::link(int n, Pointer operand) const {
  if (n >= kMaxChain) fail(fmt::format("more than {} operators one after another", kMaxChain));
  return operand;
}

ExpressionParser::Pointer ExpressionParser::make(Kind kind) const {
  auto out = std::make_unique<Expression>();
  out->kind = kind;
  out->line = token().line;
  return out;
}

ExpressionParser::Pointer ExpressionParser::make(Kind kind, Pointer a, Pointer b) const {
  Pointer out = make(kind);
  out->line = a->line;
  out->operands.push_back(std::move(a));
  if (b != nullptr) out->operands.push_back(std::move(b));
  return out;
}

ExpressionParser::Pointer ExpressionParser::constant(Value value) const {
  Pointer out = make(Kind::kConstant);
  out->value = std::move(value);
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_expression(bool conditional) {
  const Deeper deeper(*this);
  Pointer out = parse_or();
  for (int n = 0; conditional && skip_name("if"); ++n) {
    out = link(n, std::move(out));
    Pointer condition = parse_or();
    Pointer otherwise = skip_name("else") ? parse_expression() : nullptr;
    out = make(Kind::kIf, std::move(out), std::move(condition));
    out->operands.push_back(std::move(otherwise));
  }
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_tuple(bool conditional) {
  Pointer first = parse_expression(conditional);
  if (!is_operator(",")) return first;
  Pointer out = make(Kind::kTuple, std::move(first));
  while (skip_operator(",")) {
    if (!is(Token::Kind::kName) && !is(Token::Kind::kString) && !is(Token::Kind::kInteger) &&
        !is(Token::Kind::kFloat) && !is_operator("(") && !is_operator("[") && !is_operator("{") &&
        !is_operator("-") && !is_operator("+")) {
      break;  // the comma was the last
    }
    out->operands.push_back(parse_expression(conditional));
  }
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_printed() {
  // Nothing is escaped, so that "safe" has no effect on what is printed as it is. Where more comes behind it,
  // Python's result would be escaped.
  Pointer out = parse_tuple();
  while (out->kind == Kind::kFilter && out->builtin->name == "safe") {
    Pointer inner = std::move(out->operands[0]);
    out = std::move(inner);
  }
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_or() {
  Pointer out = parse_and();
  for (int n = 0; skip_name("or"); ++n) out = make(Kind::kOr, link(n, std::move(out)), parse_and());
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_and() {
  Pointer out = parse_not();
  for (int n = 0; skip_name("and"); ++n) out = make(Kind::kAnd, link(n, std::move(out)), parse_not());
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_not() {
  if (!skip_name("not")) return parse_comparison();
  const Deeper deeper(*this);
  return make(Kind::kNot, parse_not());
}

bool ExpressionParser::take_comparison(Operator& op) {
  constexpr std::pair<std::string_view, Operator> kOperators[] = {
      {"==", Operator::kEqual},     {"!=", Operator::kNotEqual}, {"<", Operator::kLess},
      {"<=", Operator::kLessEqual}, {">", Operator::kGreater},   {">=", Operator::kGreaterEqual}};
  for (const auto& [text, known] : kOperators) {
    if (!skip_operator(text)) continue;
    op = known;
    return true;
  }
  if (skip_name("in")) {
    op = Operator::kIn;
    return true;
  }
  if (is_name("not") && peek().kind == Token::Kind::kName && peek().text == "in") {
    next(), next();
    op = Operator::kNotIn;
    return true;
  }
  return false;
}

ExpressionParser::Pointer ExpressionParser::parse_comparison() {
  Pointer out = parse_sum();
  Operator op{};
  if (!take_comparison(op)) return out;
  out = make(Kind::kCompare, std::move(out));
  do {
    out->comparisons.push_back(op);
    out->operands.push_back(parse_sum());
  } while (take_comparison(op));
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_sum() {
  Pointer out = parse_concatenation();
  for (int n = 0; is_operator("+") || is_operator("-"); ++n) {
    const Operator op = next().text == "+" ? Operator::kAdd : Operator::kSubtract;
    out = make(Kind::kBinary, link(n, std::move(out)), parse_concatenation());
    out->op = op;
  }
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_concatenation() {
  Pointer out = parse_product();
  if (!is_operator("~")) return out;
  out = make(Kind::kConcatenate, std::move(out));
  while (skip_operator("~")) out->operands.push_back(parse_product());
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_product() {
  Pointer out = parse_unary(true);
  for (int n = 0; is_operator("*") || is_operator("/") || is_operator("//") || is_operator("%"); ++n) {
    const std::string_view text = next().text;
    const Operator op = text == "*"    ? Operator::kMultiply
                        : text == "/"  ? Operator::kDivide
                        : text == "//" ? Operator::kFloorDivide
                                       : Operator::kModulo;
    if (op == Operator::kModulo && out->kind == Kind::kConstant && out->value.text() != nullptr)
      fail("\"%\" behind a string");
    out = make(Kind::kBinary, link(n, std::move(out)), parse_unary(true));
    out->op = op;
  }
  if (is_operator("**")) fail("the operator \"**\"");
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_unary(bool filters) {
  const Deeper deeper(*this);
  Pointer out;
  if (skip_operator("-")) {
    out = make(Kind::kNegate, parse_unary(false));
  } else if (skip_operator("+")) {
    out = make(Kind::kPlus, parse_unary(false));
  } else {
    out = parse_primary();
  }
  out = parse_postfix(std::move(out));
  return filters ? parse_filters(std::move(out)) : std::move(out);
}

ExpressionParser::Pointer ExpressionParser::parse_primary() {
  switch (token().kind) {
    case Token::Kind::kName:
      return parse_name();
    case Token::Kind::kString:
      return parse_string();
    case Token::Kind::kInteger:
      return constant(integer_value(next()));
    case Token::Kind::kFloat:
      return constant(float_value(next()));
    default:
      if (skip_operator("(")) return parse_parentheses();
      if (skip_operator("[")) return parse_list();
      if (skip_operator("{")) return parse_dict();
      fail(fmt::format("\"{}\" where an expression is expected", token().text));
  }
}

ExpressionParser::Pointer ExpressionParser::parse_name() {
  Pointer out = make(Kind::kName);
  out->name = next().text;
  if (out->name == "true" || out->name == "True") return constant(true);
  if (out->name == "false" || out->name == "False") return constant(false);
  if (out->name == "none" || out->name == "None") return constant(None());
  constexpr std::string_view kWords[] = {"if",  "else", "in",    "is",     "and",     "or",    "not",
                                         "for", "self", "super", "caller", "varargs", "kwargs"};
  if (std::ranges::find(kWords, out->name) != std::end(kWords))
    fail(fmt::format("\"{}\" where a value is expected", out->name));
  out->symbol = symbol(out->name);
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_string() {
  std::string text;
  while (is(Token::Kind::kString)) text += next().text;
  return constant(MarkedText::constant(text, true));
}

ExpressionParser::Pointer ExpressionParser::parse_parentheses() {
  Pointer out = is_operator(")") ? make(Kind::kTuple) : parse_tuple();
  expect_operator(")");
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_list() {
  Pointer out = make(Kind::kList);
  while (!is_operator("]")) {
    if (!out->operands.empty()) expect_operator(",");
    if (is_operator("]")) break;
    out->operands.push_back(parse_expression());
  }
  expect_operator("]");
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_dict() {
  Pointer out = make(Kind::kDict);
  while (!is_operator("}")) {
    if (!out->operands.empty()) expect_operator(",");
    if (is_operator("}")) break;
    out->operands.push_back(parse_expression());
    expect_operator(":");
    out->operands.push_back(parse_expression());
  }
  expect_operator("}");
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_postfix(Pointer operand) {
  for (int n = 0;; ++n) {
    operand = link(n, std::move(operand));
    if (skip_operator(".")) {
      operand = parse_field(std::move(operand));
    } else if (skip_operator("[")) {
      operand = parse_subscript(std::move(operand));
    } else if (is_operator("(")) {
      operand = parse_call(std::move(operand));
    } else {
      return operand;
    }
  }
}

ExpressionParser::Pointer ExpressionParser::parse_field(Pointer operand) {
  if (is(Token::Kind::kInteger)) {
    Pointer index = constant(integer_value(next()));
    return make(Kind::kItem, std::move(operand), std::move(index));
  }
  Pointer out = make(Kind::kField, std::move(operand));
  out->name = expect_name();
  if (out->name.starts_with("__")) fail(fmt::format("the attribute \"{}\"", out->name));
  return out;
}

ExpressionParser::Pointer ExpressionParser::parse_subscript(Pointer operand) {
  Pointer parts[3];
  int colons = 0;
  while (!is_operator("]")) {
    if (skip_operator(":")) {
      if (++colons > 2) fail("a slice with more than two \":\"");
    } else if (parts[colons] != nullptr) {
      fail(fmt::format("\"{}\" where \"]\" is expected", token().text));
    } else {
      parts[colons] = parse_expression();
    }
  }
  if (colons == 0 && parts[0] == nullptr) fail("\"[]\" behind a value");
  expect_operator("]");
  if (colons == 0) return make(Kind::kItem, std::move(operand), std::move(parts[0]));
  Pointer out = make(Kind::kSlice, std::move(operand));
  for (Pointer& part : parts) out->operands.push_back(std::move(part));
  return out;
}

void ExpressionParser::parse_arguments(Expression& call) {
  expect_operator("(");
  for (bool first = true; !is_operator(")"); first = false) {
    if (!first) expect_operator(",");
    if (is_operator(")")) break;
    if (is_operator("*") || is_operator("**")) fail("\"*\" before an argument");
    if (is(Token::Kind::kName) && peek().kind == Token::Kind::kOperator && peek().text == "=") {
      std::string name = next().text;
      next();
      call.named.emplace_back(std::move(name), parse_expression());
    } else {
      if (!call.named.empty()) fail("an argument without a name behind one with a name");
      call.operands.push_back(parse_expression());
    }
  }
  expect_operator(")");
}

ExpressionParser::Pointer ExpressionParser::parse_call(Pointer callee) {
  if (callee->kind == Kind::kField) {
    const bool cycle = callee->name == "cycle" && callee->operands[0]->kind == Kind::kName &&
                       callee->operands[0]->name == "loop";
    // A list of a client's does not change; one that a template keeps in a namespace may.
    const bool changes = callee->name == "append" || callee->name == "pop";
    const bool kept = callee->operands[0]->kind == Kind::kField;
    if (!cycle && !is_method(callee->name) && !(changes && kept))
      fail(fmt::format("the method \"{}\"", callee->name));
    callee->kind = cycle ? Kind::kCycle : Kind::kCallMethod;
    parse_arguments(*callee);
    return callee;
  }
  if (callee->kind != Kind::kName) fail("the call of a value");
  if (is_macro(callee->name)) {
    callee->kind = Kind::kCallMacro;
  } else if ((callee->builtin = find_function(callee->name)) != nullptr) {
    callee->kind = Kind::kCallBuiltin;
  } else {
    fail(fmt::format("the function \"{}\"", callee->name));
  }
  parse_arguments(*callee);
  return callee;
}

ExpressionParser::Pointer ExpressionParser::parse_filters(Pointer operand) {
  for (int n = 0;; ++n) {
    operand = link(n, std::move(operand));
    if (skip_operator("|")) {
      operand = parse_filter(std::move(operand));
    } else if (skip_name("is")) {
      operand = parse_test(std::move(operand));
    } else {
      return operand;
    }
  }
}

ExpressionParser::Pointer ExpressionParser::parse_filter(Pointer operand) {
  if (operand->kind == Kind::kFilter && operand->builtin->name == "safe") fail("a filter behind \"safe\"");
  Pointer out = make(Kind::kFilter, std::move(operand));
  out->line = token().line;
  const std::string name = expect_name();
  out->builtin = find_filter(name);
  if (out->builtin == nullptr) fail(fmt::format("the filter \"{}\"", name));
  if (is_operator("(")) parse_arguments(*out);
  check_named_builtin(*out);
  return out;
}

/// map('filter'), select('test') and their like name another builtin.
void ExpressionParser::check_named_builtin(const Expression& filter) const {
  const std::string_view name = filter.builtin->name;
  const bool map = name == "map", select = name == "select" || name == "reject";
  const std::size_t place = name == "selectattr" || name == "rejectattr" ? 2 : 1;
  if ((!map && !select && place == 1) || filter.operands.size() <= place) return;
  const Expression& named = *filter.operands[place];
  const MarkedText* text = named.kind == Kind::kConstant ? named.value.text() : nullptr;
  if (text == nullptr) fail(fmt::format("\"{}\" of something that is not named", name));
  if ((map ? find_filter(text->view()) : find_test(text->view())) == nullptr) {
    fail(fmt::format("the {} \"{}\"", map ? "filter" : "test", text->view()));
  }
}

ExpressionParser::Pointer ExpressionParser::parse_test(Pointer operand) {
  const bool negated = skip_name("not");
  Pointer out = make(Kind::kTest, std::move(operand));
  out->line = token().line;
  const std::string name = expect_name();
  out->builtin = find_test(name);
  if (out->builtin == nullptr) fail(fmt::format("the test \"{}\"", name));
  const bool value_follows = is(Token::Kind::kString) || is(Token::Kind::kInteger) ||
                             is(Token::Kind::kFloat) || is_operator("[") || is_operator("{");
  constexpr std::string_view kWords[] = {"else", "or", "and", "if", "in", "is", "not"};
  if (is_operator("(")) {
    parse_arguments(*out);
  } else if (value_follows ||
             (is(Token::Kind::kName) && std::ranges::find(kWords, token().text) == std::end(kWords))) {
    out->operands.push_back(parse_postfix(parse_primary()));
  }
  return negated ? make(Kind::kNot, std::move(out)) : std::move(out);
}

}  // namespace flash_mla::text::jinja
