#define PCRE2_CODE_UNIT_WIDTH 8
#include "text/regex.h"

#include <fmt/format.h>
#include <pcre2.h>

#include <new>

#include "flash_mla/error.h"

namespace flash_mla::text {
namespace {

struct Deleter {
  void operator()(pcre2_code* p) const { pcre2_code_free(p); }
  void operator()(pcre2_compile_context* p) const { pcre2_compile_context_free(p); }
  void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
  void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
  void operator()(pcre2_jit_stack* p) const { pcre2_jit_stack_free(p); }
};
template <typename T>
using Owned = std::unique_ptr<T, Deleter>;

template <typename T>
T* checked(T* p) {
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

/// What a match writes to; one for each thread.
struct Scratch {
  // Machine code starts with 32 KiB of stack; long runs of a repeated group need more.
  Owned<pcre2_jit_stack> stack{pcre2_jit_stack_create(32 * 1024, 16 * 1024 * 1024, nullptr)};
  Owned<pcre2_match_context> context{checked(pcre2_match_context_create(nullptr))};
  Owned<pcre2_match_data> data{checked(pcre2_match_data_create(1, nullptr))};

  Scratch() { pcre2_jit_stack_assign(context.get(), nullptr, stack.get()); }
};

Scratch& scratch() {
  thread_local Scratch instance;
  return instance;
}

std::string message_of(int error) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(error, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

}  // namespace

struct Regex::Impl {
  std::string where;
  Owned<pcre2_code> code;
};

Regex::Regex(std::string_view pattern, std::string where) : impl_(std::make_unique<Impl>()) {
  impl_->where = fmt::format("{} = \"{}\"", where, pattern);
  // A greedy run that fails at its first character fails at its others too. Said so, it is not tried from
  // each of them, which would be quadratic: the only expression of DeepSeek's where PCRE2 does not see it by
  // itself.
  const std::string translated = pattern == "\\s+$" ? "(?<!" + oniguruma_to_pcre2("\\s", impl_->where) + ")" +
                                                          oniguruma_to_pcre2(pattern, where)
                                                    : oniguruma_to_pcre2(pattern, impl_->where);
  const Owned<pcre2_compile_context> context(checked(pcre2_compile_context_create(nullptr)));
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE offset = 0;
  impl_->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                  PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error,
                                  &offset, context.get()));
  if (impl_->code == nullptr) {
    throw InvalidArgument(
        fmt::format("{}: {}: expected a regular expression", impl_->where, message_of(error)));
  }
  std::uint32_t matches_empty = 0;
  pcre2_pattern_info(impl_->code.get(), PCRE2_INFO_MATCHEMPTY, &matches_empty);
  if (matches_empty != 0) {
    throw Unsupported(
        fmt::format("{}: it may match the empty string; expected one that does not", impl_->where));
  }
  // Where there is no compiler for this machine, pcre2_match interprets.
  pcre2_jit_compile(impl_->code.get(), PCRE2_JIT_COMPLETE);
}

Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;
Regex::~Regex() = default;

void Regex::split(std::string_view text, std::vector<std::string_view>& pieces) const {
  const Scratch& s = scratch();
  std::size_t from = 0;
  while (from < text.size()) {
    const int result = pcre2_match(impl_->code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                   from, PCRE2_NO_UTF_CHECK, s.data.get(), s.context.get());
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result < 0) {
      throw InvalidArgument(
          fmt::format("text: at byte {} of {}: {}: {}", from, text.size(), impl_->where, message_of(result)));
    }
    const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(s.data.get());
    if (ends[0] > from) pieces.push_back(text.substr(from, ends[0] - from));
    pieces.push_back(text.substr(ends[0], ends[1] - ends[0]));
    from = ends[1];
  }
  if (from < text.size()) pieces.push_back(text.substr(from));
}

}  // namespace flash_mla::text
