#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "text/jinja/ast.h"
#include "text/jinja/lexer.h"

namespace flash_mla::text::jinja {

/// Reads expressions from tokens; the parser of statements builds on it.
class ExpressionParser {
 protected:
  using Pointer = std::unique_ptr<Expression>;

  ExpressionParser(std::vector<Token> tokens, Program& program);

  const Token& token() const { return tokens_[at_]; }
  const Token& peek() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  const Token& next() { return token().kind == Token::Kind::kEnd ? token() : tokens_[at_++]; }
  bool is(Token::Kind kind) const { return token().kind == kind; }
  bool is_operator(std::string_view text) const { return is(Token::Kind::kOperator) && token().text == text; }
  bool is_name(std::string_view text) const { return is(Token::Kind::kName) && token().text == text; }
  bool skip_operator(std::string_view text);
  bool skip_name(std::string_view text);
  void expect_operator(std::string_view text);
  std::string expect_name();
  [[noreturn]] void fail(const std::string& what) const { throw SyntaxProblem{token().line, what}; }
  Symbol symbol(const std::string& name);
  bool is_macro(const std::string& name) const { return macros_.contains(name); }

  /// `conditional`: whether "a if b else c" may come.
  Pointer parse_expression(bool conditional = true);
  /// One expression, or several with commas between them: a tuple.
  Pointer parse_tuple(bool conditional = true);
  /// The expression of {{ }}, where "| safe" at the end changes nothing.
  Pointer parse_printed();
  Pointer parse_filters(Pointer operand);

 private:
  struct Deeper;
  Pointer make(Expression::Kind kind) const;
  Pointer make(Expression::Kind kind, Pointer a, Pointer b = nullptr) const;
  Pointer constant(Value value) const;
  /// `operand`, as the n-th of a chain of operators: refuses chains that evaluation could not go down.
  Pointer link(int n, Pointer operand) const;

  Pointer parse_or();
  Pointer parse_and();
  Pointer parse_not();
  Pointer parse_comparison();
  bool take_comparison(Operator& op);
  Pointer parse_sum();
  Pointer parse_concatenation();
  Pointer parse_product();
  Pointer parse_unary(bool filters);
  Pointer parse_primary();
  Pointer parse_name();
  Pointer parse_string();
  Pointer parse_parentheses();
  Pointer parse_list();
  Pointer parse_dict();
  Pointer parse_postfix(Pointer operand);
  Pointer parse_field(Pointer operand);
  Pointer parse_subscript(Pointer operand);
  Pointer parse_call(Pointer callee);
  Pointer parse_filter(Pointer operand);
  Pointer parse_test(Pointer operand);
  void parse_arguments(Expression& call);
  void check_named_builtin(const Expression& filter) const;

  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  int depth_ = 0;
  std::set<std::string> macros_;  // of the whole template: one may call another that follows
  std::map<std::string, Symbol> symbols_;
  Program& program_;
};

}  // namespace flash_mla::text::jinja
