#include <fmt/format.h>

#include <algorithm>

#include "text/jinja/builtins.h"
#include "text/jinja/characters.h"
#include "text/jinja/strings.h"

namespace flash_mla::text::jinja {
namespace {

std::optional<MarkedText> optional_text(Arguments& a, std::string_view name) {
  const Value value = a.take(name, None());
  if (value.is_none()) return std::nullopt;
  if (value.text() == nullptr)
    throw Problem{fmt::format("{} is a {}; expected a string", name, value.kind())};
  return *value.text();
}

template <bool kLeft, bool kRight>
Value strip(const Value& self, Arguments& a) {
  return stripped(*self.text(), optional_text(a, "chars"), kLeft, kRight);
}

template <bool kFromRight>
Value split_at(const Value& self, Arguments& a) {
  const std::optional<MarkedText> separator = optional_text(a, "sep");
  const std::int64_t limit = a.integer("maxsplit", -1);
  if (separator) return List{split(*self.text(), separator->view(), limit, kFromRight)};
  if (kFromRight && limit >= 0) throw Problem{"rsplit at white space with a limit"};
  return List{split_words(*self.text(), limit)};
}

Value splitlines(const Value& self, Arguments&) { return List{split_lines(*self.text())}; }

/// Whether it begins (or ends) with a string, or with one of a tuple.
template <bool kBegins>
Value matches(const Value& self, Arguments& a) {
  const Value wanted = a.require("prefix");
  const std::string_view text = self.text()->view();
  const auto match = [&](const Value& x) {
    if (x.text() == nullptr) throw Problem{fmt::format("startswith or endswith a {}", x.kind())};
    return kBegins ? text.starts_with(x.text()->view()) : text.ends_with(x.text()->view());
  };
  if (wanted.list() != nullptr && wanted.list()->tuple)
    return std::ranges::any_of(wanted.list()->items, match);
  return match(wanted);
}

Value replace(const Value& self, Arguments& a) {
  const MarkedText old = a.text("old"), by = a.text("new");
  return replaced(*self.text(), old.view(), by, a.integer("count", -1));
}

template <bool kFromRight>
Value find(const Value& self, Arguments& a) {
  const MarkedText wanted = a.text("sub");
  const std::string_view text = self.text()->view();
  const std::size_t at = kFromRight ? text.rfind(wanted.view()) : text.find(wanted.view());
  return at == text.npos ? std::int64_t{-1} : static_cast<std::int64_t>(count_characters(text.substr(0, at)));
}

Value count(const Value& self, Arguments& a) {
  const Value wanted = a.require("sub");
  if (self.list() != nullptr) {
    return static_cast<std::int64_t>(
        std::ranges::count_if(self.list()->items, [&](const Value& x) { return equal(x, wanted); }));
  }
  if (wanted.text() == nullptr || wanted.text()->empty())
    throw Problem{"count of something that is no string, or empty"};
  return static_cast<std::int64_t>(split(*self.text(), wanted.text()->view(), -1, false).size()) - 1;
}

Value join(const Value& self, Arguments& a) {
  MarkedText out;
  bool begun = false;
  for (const Value& item : items_of(a.require("iterable"))) {
    if (item.text() == nullptr) throw Problem{fmt::format("a {} in join; expected strings", item.kind())};
    if (begun) out.append(*self.text());
    begun = true;
    out.append(*item.text());
  }
  return out;
}

template <bool kPrefix>
Value remove_affix(const Value& self, Arguments& a) {
  const MarkedText affix = a.text("affix");
  const std::string_view text = self.text()->view();
  if (kPrefix ? !text.starts_with(affix.view()) : !text.ends_with(affix.view())) return self;
  return kPrefix ? self.text()->slice(affix.size(), text.size())
                 : self.text()->slice(0, text.size() - affix.size());
}

template <Case kCase>
Value cased(const Value& self, Arguments&) {
  return with_case(*self.text(), kCase);
}

/// "{}" and "{0}", nothing more of Python's format strings.
Value format(const Value& self, Arguments& a) {
  const std::string_view text = self.text()->view();
  MarkedText out;
  std::size_t automatic = 0, used = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t brace = std::min(text.find_first_of("{}", at), text.size());
    out.append(self.text()->slice(at, brace));
    at = brace;
    if (at == text.size()) break;
    if (at + 1 < text.size() && text[at + 1] == text[at]) {
      out.append(self.text()->slice(at, at + 1));
      at += 2;
      continue;
    }
    const std::size_t end = text.find('}', at);
    const std::string_view place =
        text.substr(at, 1) == "{" && end != text.npos ? text.substr(at + 1, end - at - 1) : "?";
    if (!place.empty() && (place.size() > 1 || place[0] < '0' || place[0] > '9')) {
      throw Problem{"format with something else than {} and {0} to {9}"};
    }
    const std::size_t index = place.empty() ? automatic++ : static_cast<std::size_t>(place[0] - '0');
    if (index >= a.positional.size()) throw Problem{"format with too few arguments"};
    used = std::max(used, index + 1);
    out.append(to_text(a.positional[index]));
    at = end + 1;
  }
  a.positional.clear();
  return out;
}

Value get(const Value& self, Arguments& a) {
  const Value key = a.require("key");
  const Value fallback = a.take("default", None());
  const Value* found = self.dict()->find(key);
  return found == nullptr ? fallback : *found;
}

Value items(const Value& self, Arguments&) {
  List out;
  for (const auto& [key, value] : self.dict()->items())
    out.items.push_back(List{{key, value}, /*tuple=*/true});
  return out;
}

Value keys(const Value& self, Arguments&) { return List{items_of(self)}; }

Value values(const Value& self, Arguments&) {
  List out;
  for (const auto& item : self.dict()->items()) out.items.push_back(item.second);
  return out;
}

Value index(const Value& self, Arguments& a) {
  const Value wanted = a.require("value");
  const auto& items = self.list()->items;
  const auto found = std::ranges::find_if(items, [&](const Value& x) { return equal(x, wanted); });
  if (found == items.end()) throw Problem{"index of what a list does not have"};
  return static_cast<std::int64_t>(found - items.begin());
}

Value copy(const Value& self, Arguments&) { return self; }

constexpr Builtin kStringMethods[] = {{"capitalize", false, cased<Case::kCapitalized>},
                                      {"count", false, count},
                                      {"endswith", true, matches<false>},
                                      {"find", false, find<false>},
                                      {"format", false, format},
                                      {"join", false, join},
                                      {"lower", false, cased<Case::kLower>},
                                      {"lstrip", false, strip<true, false>},
                                      {"removeprefix", false, remove_affix<true>},
                                      {"removesuffix", false, remove_affix<false>},
                                      {"replace", false, replace},
                                      {"rfind", false, find<true>},
                                      {"rsplit", false, split_at<true>},
                                      {"rstrip", false, strip<false, true>},
                                      {"split", false, split_at<false>},
                                      {"splitlines", false, splitlines},
                                      {"startswith", true, matches<true>},
                                      {"strip", false, strip<true, true>},
                                      {"title", false, cased<Case::kTitle>},
                                      {"upper", false, cased<Case::kUpper>}};
constexpr Builtin kDictMethods[] = {{"copy", true, copy},
                                    {"get", true, get},
                                    {"items", false, items},
                                    {"keys", false, keys},
                                    {"values", false, values}};
constexpr Builtin kListMethods[] = {{"copy", true, copy}, {"count", false, count}, {"index", false, index}};

template <std::size_t kSize>
const Builtin* find_in(const Builtin (&methods)[kSize], std::string_view name) {
  const auto* found = std::ranges::find(methods, name, &Builtin::name);
  return found == std::end(methods) ? nullptr : found;
}

const Builtin* method_of(const Value& value, std::string_view name) {
  if (value.text() != nullptr) return find_in(kStringMethods, name);
  if (value.dict() != nullptr) return find_in(kDictMethods, name);
  if (value.list() != nullptr) return find_in(kListMethods, name);
  return nullptr;
}

}  // namespace

bool is_method(std::string_view name) {
  return find_in(kStringMethods, name) != nullptr || find_in(kDictMethods, name) != nullptr ||
         find_in(kListMethods, name) != nullptr;
}

bool has_method(const Value& value, std::string_view name) { return method_of(value, name) != nullptr; }

Value call_method(const Value& self, std::string_view name, Arguments& arguments) {
  const Builtin* method = method_of(self, name);
  if (method == nullptr)
    throw Problem{fmt::format("the method \"{}\" of a value of kind: {}", name, self.kind())};
  return method->run(self, arguments);
}

}  // namespace flash_mla::text::jinja
