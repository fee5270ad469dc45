#include "text/fill_in_the_middle.h"

#include <string>

#include "flash_mla/error.h"

namespace flash_mla::text {
namespace {

// In front of the prefix, of the suffix, and of what is generated.
struct Marks {
  const char *prefix, *suffix, *middle;
};

constexpr Marks kMarks[] = {
    {"<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>",
     "<\uff5cfim\u2581end\uff5c>"},  // DeepSeek
    {"<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"},
    {"<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"},  // GLM
};

}  // namespace

std::vector<TextPart> fill_in_the_middle(const Tokenizer& tokenizer, std::string_view prefix,
                                         std::string_view suffix) {
  for (const Marks& marks : kMarks) {
    if (tokenizer.token_to_id(marks.prefix) < 0 || tokenizer.token_to_id(marks.suffix) < 0 ||
        tokenizer.token_to_id(marks.middle) < 0) {
      continue;
    }
    return {{marks.prefix, true},
            {std::string(prefix), false},
            {marks.suffix, true},
            {std::string(suffix), false},
            {marks.middle, true}};
  }
  throw Unsupported("suffix: the model's tokenizer has no tokens to fill in the middle");
}

}  // namespace flash_mla::text
