#include "text/jinja/template.h"

#include <fmt/format.h>

#include <algorithm>

#include "flash_mla/error.h"
#include "text/jinja/evaluator.h"
#include "text/jinja/lexer.h"
#include "text/jinja/parser.h"
#include "text/utf8.h"

namespace flash_mla::text::jinja {

Template Template::parse(std::string_view source, std::string_view origin) {
  std::string storage;
  try {
    Template out;
    out.program_ = std::make_shared<const Program>(jinja::parse(replace_invalid_utf8(source, storage)));
    return out;
  } catch (const SyntaxProblem& problem) {
    throw Unsupported(fmt::format("{}:{}: the chat template has {}, which this library does not understand",
                                  origin, problem.line, problem.what));
  }
}

std::vector<TextPart> Template::render(const std::vector<std::pair<std::string, Value>>& variables) const {
  std::vector<TextPart> out;
  evaluate(*program_, variables).for_each_run([&](std::string_view text, bool control) {
    out.push_back({std::string(text), control});
  });
  return out;
}

bool Template::reads(std::string_view name) const {
  return std::ranges::find(program_->names, name) != program_->names.end();
}

}  // namespace flash_mla::text::jinja
