#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/jinja/value.h"
#include "text/text_part.h"

namespace flash_mla::text::jinja {

struct Program;

/// A chat template in Jinja: the subset that published templates use, with the meaning that transformers and
/// Python's Jinja2 give it. Immutable; threads may share one.
class Template {
 public:
  /// Throws Unsupported, with the line, for whatever it does not understand: no template is half understood.
  static Template parse(std::string_view source, std::string_view origin);

  /// What the template prints. Its own text is control, as are variables that say so; what comes of a
  /// client's values never is, whatever the template does with them. Throws InvalidArgument for values that
  /// the template refuses or cannot work with.
  std::vector<TextPart> render(const std::vector<std::pair<std::string, Value>>& variables) const;

  /// Whether the template reads a variable of this name.
  bool reads(std::string_view name) const;

 private:
  std::shared_ptr<const Program> program_;
};

}  // namespace flash_mla::text::jinja
