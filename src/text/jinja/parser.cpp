#include "text/jinja/parser.h"

#include <fmt/format.h>

#include <algorithm>

#include "text/jinja/expression_parser.h"
#include "text/jinja/lexer.h"

namespace flash_mla::text::jinja {
namespace {

using Kind = Statement::Kind;

class Parser : ExpressionParser {
 public:
  Parser(std::string_view source, Program& program)
      : ExpressionParser(tokenize(source), program), program_(program) {}

  void run() {
    read_body(program_.body, {});
    if (!is(Token::Kind::kEnd)) fail(fmt::format("\"{}\" without its beginning", token().text));
    program_.macros.resize(program_.names.size());
  }

 private:
  using Body = std::vector<std::unique_ptr<Statement>>;
  static constexpr int kMaxDepth = 50;  // of tags within each other

  std::unique_ptr<Statement> make(Kind kind) const {
    auto out = std::make_unique<Statement>();
    out->kind = kind;
    out->line = token().line;
    return out;
  }

  /// Up to a tag whose name is one of `ends`, behind which the parser then stands; the name.
  std::string read_body(Body& body, std::initializer_list<std::string_view> ends) {
    const int begin = token().line;
    if (++depth_ > kMaxDepth) fail(fmt::format("tags nested more than {} deep", kMaxDepth));
    while (!is(Token::Kind::kEnd)) {
      if (is(Token::Kind::kData)) {
        auto text = make(Kind::kText);
        text->text = MarkedText::constant(next().text, true);
        body.push_back(std::move(text));
      } else if (is(Token::Kind::kPrintBegin)) {
        next();
        auto print = make(Kind::kPrint);
        print->expression = parse_printed();
        expect(Token::Kind::kPrintEnd, "}}");
        body.push_back(std::move(print));
      } else {
        next();
        const std::string name = expect_name();
        if (std::ranges::find(ends, name) != ends.end()) {
          --depth_;
          return name;
        }
        read_tag(name, body);
      }
    }
    if (ends.size() != 0)
      throw SyntaxProblem{begin, fmt::format("a tag without its \"{}\"", *(ends.end() - 1))};
    --depth_;
    return "";
  }

  void expect(Token::Kind kind, std::string_view text) {
    if (!is(kind)) fail(fmt::format("\"{}\" where \"{}\" is expected", token().text, text));
    next();
  }
  void end_tag() { expect(Token::Kind::kBlockEnd, "%}"); }

  void read_tag(const std::string& name, Body& body) {
    if (name == "if") {
      read_if(body);
    } else if (name == "for") {
      read_for(body);
    } else if (name == "set") {
      read_set(body);
    } else if (name == "macro") {
      read_macro();
    } else if (name == "with") {
      read_with(body);
    } else if (name == "generation") {  // transformers' mark of what an assistant said
      end_tag();
      auto part = make(Kind::kBody);
      read_body(part->body, {"endgeneration"});
      end_tag();
      body.push_back(std::move(part));
    } else if (name == "break" || name == "continue") {
      if (loops_ == 0) fail(fmt::format("\"{}\" outside of a loop", name));
      body.push_back(make(name == "break" ? Kind::kBreak : Kind::kContinue));
      end_tag();
    } else {
      fail(fmt::format("the tag \"{}\"", name));
    }
  }

  void read_if(Body& body) {
    auto statement = make(Kind::kIf);
    statement->expression = parse_tuple(false);
    end_tag();
    const std::string end = read_body(statement->body, {"elif", "else", "endif"});
    if (end == "elif") {
      if (++elifs_ > kMaxElifs) fail(fmt::format("more than {} \"elif\"", kMaxElifs));
      read_if(statement->otherwise);
      --elifs_;
      body.push_back(std::move(statement));
      return;
    }
    end_tag();
    if (end == "else") {
      read_body(statement->otherwise, {"endif"});
      end_tag();
    }
    body.push_back(std::move(statement));
  }

  void read_for(Body& body) {
    auto statement = make(Kind::kFor);
    statement->target = read_names();
    if (!skip_name("in")) fail("\"for\" without \"in\"");
    statement->expression = parse_tuple(false);
    if (skip_name("if")) statement->condition = parse_expression();
    if (is_name("recursive")) fail("\"recursive\"");
    end_tag();
    ++loops_;
    const std::string end = read_body(statement->body, {"else", "endfor"});
    --loops_;
    end_tag();
    if (end == "else") {
      read_body(statement->otherwise, {"endfor"});
      end_tag();
    }
    body.push_back(std::move(statement));
  }

  Target read_names() {
    Target out;
    const bool parentheses = skip_operator("(");
    do {
      if (!is(Token::Kind::kName)) break;
      out.symbols.push_back(target_name());
      if (is_operator(",")) out.tuple = true;
    } while (skip_operator(","));
    if (parentheses) expect_operator(")");
    if (out.symbols.empty()) fail("no name to assign to");
    return out;
  }

  Symbol target_name() {
    const std::string name = expect_name();
    constexpr std::string_view kTaken[] = {"loop", "true", "false", "none", "True", "False", "None"};
    if (std::ranges::find(kTaken, name) != std::end(kTaken) || is_macro(name)) {
      fail(fmt::format("an assignment to \"{}\"", name));
    }
    return symbol(name);
  }

  Target read_target() {
    if (!is(Token::Kind::kName) || peek().text != "." || peek().kind != Token::Kind::kOperator)
      return read_names();
    Target out;
    out.symbols = {symbol(next().text)};
    next();
    out.field = expect_name();
    return out;
  }

  void read_set(Body& body) {
    auto statement = make(Kind::kSet);
    statement->target = read_target();
    if (skip_operator("=")) {
      statement->expression = parse_tuple();
      end_tag();
    } else {
      if (is_operator("|")) fail("a filter in \"set\"");
      statement->kind = Kind::kSetBlock;
      end_tag();
      read_body(statement->body, {"endset"});
      end_tag();
    }
    body.push_back(std::move(statement));
  }

  void read_with(Body& body) {
    auto scope = make(Kind::kScope);
    while (!is(Token::Kind::kBlockEnd)) {
      if (!scope->body.empty()) fail("\"with\" with more than one assignment");
      auto assignment = make(Kind::kSet);
      assignment->target = read_names();
      expect_operator("=");
      assignment->expression = parse_expression();
      scope->body.push_back(std::move(assignment));
    }
    end_tag();
    read_body(scope->body, {"endwith"});
    end_tag();
    body.push_back(std::move(scope));
  }

  void read_macro() {
    if (depth_ > 1) fail("a macro within another tag");
    auto macro = std::make_unique<Macro>();
    macro->name = expect_name();
    expect_operator("(");
    while (!is_operator(")")) {
      if (!macro->parameters.empty()) expect_operator(",");
      const Symbol name = target_name();
      macro->parameters.emplace_back(name, skip_operator("=") ? parse_expression() : nullptr);
    }
    expect_operator(")");
    end_tag();
    const int loops = std::exchange(loops_, 0);
    read_body(macro->body, {"endmacro"});
    loops_ = loops;
    end_tag();
    const auto place = static_cast<std::size_t>(symbol(macro->name));
    if (program_.macros.size() <= place) program_.macros.resize(place + 1);
    if (program_.macros[place] != nullptr) fail(fmt::format("a second macro \"{}\"", macro->name));
    program_.macros[place] = std::move(macro);
  }

  static constexpr int kMaxElifs = 100;
  Program& program_;
  int depth_ = 0, loops_ = 0, elifs_ = 0;
};

}  // namespace

Program parse(std::string_view source) {
  Program out;
  Parser(source, out).run();
  return out;
}

}  // namespace flash_mla::text::jinja
