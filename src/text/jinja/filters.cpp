#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>

#include "text/jinja/arithmetic.h"
#include "text/jinja/builtins.h"
#include "text/jinja/characters.h"
#include "text/jinja/json_text.h"
#include "text/jinja/strings.h"

namespace flash_mla::text::jinja {
namespace {

std::size_t length_of(const Value& x) {
  if (x.text() != nullptr) return count_characters(x.text()->view());
  if (x.list() != nullptr) return x.list()->items.size();
  if (x.dict() != nullptr) return x.dict()->size();
  if (x.is_undefined()) return 0;
  throw Problem{fmt::format("the length of a {}", x.kind())};
}

Value length(const Value& x, Arguments&) { return static_cast<std::int64_t>(length_of(x)); }

Value with_default(const Value& x, Arguments& a) {
  Value fallback = a.take("default_value", MarkedText());
  const bool falsy = a.take("boolean", false).truth();
  return x.is_undefined() || (falsy && !x.truth()) ? fallback : x;
}

Value first(const Value& x, Arguments&) {
  if (x.list() != nullptr)
    return x.list()->items.empty() ? Value(Undefined{"first"}) : x.list()->items.front();
  const std::vector<Value> items = items_of(x);
  return items.empty() ? Value(Undefined{"first"}) : items.front();
}

Value last(const Value& x, Arguments&) {
  if (x.list() != nullptr) return x.list()->items.empty() ? Value(Undefined{"last"}) : x.list()->items.back();
  const std::vector<Value> items = items_of(x);
  return items.empty() ? Value(Undefined{"last"}) : items.back();
}

Value list(const Value& x, Arguments&) { return List{items_of(x)}; }

Value reverse(const Value& x, Arguments&) {
  std::vector<Value> items = items_of(x);
  std::ranges::reverse(items);
  if (x.text() == nullptr) return List{std::move(items)};
  MarkedText out;
  for (const Value& item : items) out.append(*item.text());
  return out;
}

Value items(const Value& x, Arguments&) {
  List out;
  if (x.is_undefined()) return out;
  if (x.dict() == nullptr) throw Problem{fmt::format("the items of a {}; expected a dict", x.kind())};
  for (const auto& [key, value] : x.dict()->items()) out.items.push_back(List{{key, value}, /*tuple=*/true});
  return out;
}

/// The field that "a.b.0" leads to.
Value attribute_of(Value x, const Value& path) {
  if (path.is_integer()) return item_of(x, path);
  if (path.text() == nullptr) throw Problem{fmt::format("attribute is a {}; expected a string", path.kind())};
  for (const Value& part : split(*path.text(), ".", -1, false)) {
    const std::string_view name = part.text()->view();
    const bool digits = !name.empty() && name.size() < 10 &&
                        std::ranges::all_of(name, [](char c) { return c >= '0' && c <= '9'; });
    x = item_of(x, digits ? Value(static_cast<std::int64_t>(std::stol(std::string(name)))) : part);
  }
  return x;
}

Value join(const Value& x, Arguments& a) {
  const MarkedText between = to_text(a.take("d", MarkedText()));
  const Value attribute = a.take("attribute", None());
  MarkedText out;
  bool begun = false;
  for (const Value& item : items_of(x)) {
    if (begun) out.append(between);
    begun = true;
    out.append(to_text(attribute.is_none() ? item : attribute_of(item, attribute)));
  }
  return out;
}

/// What map and select go over: nothing for whatever is false, None among it.
std::vector<Value> items_if_any(const Value& x) { return x.truth() ? items_of(x) : std::vector<Value>(); }

Value map(const Value& x, Arguments& a) {
  List out;
  if (a.positional.empty()) {
    const Value attribute = a.require("attribute"), fallback = a.take("default", Undefined{"default"});
    for (const Value& item : items_if_any(x)) {
      Value field = attribute_of(item, attribute);
      out.items.push_back(field.is_undefined() && !fallback.is_undefined() ? fallback : std::move(field));
    }
    return out;
  }
  const Builtin* filter = find_filter(a.text("filter").view());
  if (filter == nullptr) throw Problem{"map with an unknown filter"};
  Arguments rest = std::exchange(a, {});
  rest.positional.erase(rest.positional.begin());
  for (const Value& item : items_if_any(x)) {
    Arguments own;
    own.positional = rest.positional;
    own.named = rest.named;
    out.items.push_back(filter->run(item, own));
    own.finish();
  }
  return out;
}

/// Items (or those whose attribute) pass a test, or are true where none is named.
template <bool kAttribute, bool kKeep>
Value select(const Value& x, Arguments& a) {
  const Value attribute = kAttribute ? a.require("attribute") : Value();
  const std::optional<Value> name = a.take("test");
  const Builtin* test = name && name->text() != nullptr ? find_test(name->text()->view()) : nullptr;
  if (name && test == nullptr) throw Problem{"a selection by an unknown test"};
  Arguments rest = std::exchange(a, {});
  const std::size_t used = (kAttribute ? 1 : 0) + (name ? 1 : 0);
  rest.positional.erase(rest.positional.begin(), rest.positional.begin() + static_cast<std::ptrdiff_t>(used));
  List out;
  for (const Value& item : items_if_any(x)) {
    const Value tested = kAttribute ? attribute_of(item, attribute) : item;
    Arguments own;
    own.positional = rest.positional;
    own.named = rest.named;
    const bool passes = test == nullptr ? tested.truth() : test->run(tested, own).truth();
    own.finish();
    if (passes == kKeep) out.items.push_back(item);
  }
  return out;
}

/// What values are ordered by: strings without regard to case, unless asked for.
Value sort_key(const Value& x, bool case_sensitive) {
  return x.text() == nullptr || case_sensitive ? x : Value(with_case(*x.text(), Case::kLower));
}

std::vector<Value> sorted(std::vector<Value> items, bool reverse,
                          const std::function<Value(const Value&)>& key) {
  std::vector<std::pair<Value, Value>> keyed;
  for (Value& item : items) {
    Value k = key(item);
    keyed.emplace_back(std::move(k), std::move(item));
  }
  for (std::size_t i = 1; i < keyed.size(); ++i) less(keyed[0].first, keyed[i].first);  // all have an order
  std::ranges::stable_sort(keyed, [&](const auto& a, const auto& b) {
    return reverse ? less(b.first, a.first) : less(a.first, b.first);
  });
  for (std::size_t i = 0; i < items.size(); ++i) items[i] = std::move(keyed[i].second);
  return items;
}

Value sort(const Value& x, Arguments& a) {
  const bool reverse = a.take("reverse", false).truth(),
             case_sensitive = a.take("case_sensitive", false).truth();
  const Value attribute = a.take("attribute", None());
  return List{sorted(items_of(x), reverse, [&](const Value& item) {
    return sort_key(attribute.is_none() ? item : attribute_of(item, attribute), case_sensitive);
  })};
}

Value dictsort(const Value& x, Arguments& a) {
  const bool case_sensitive = a.take("case_sensitive", false).truth();
  const MarkedText by = to_text(a.take("by", MarkedText("key", true)));
  const bool reverse = a.take("reverse", false).truth();
  if (by.view() != "key" && by.view() != "value")
    throw Problem{"dictsort by something else than \"key\" or \"value\""};
  Arguments none;
  const Value pairs = items(x, none);
  return List{sorted(pairs.list()->items, reverse, [&](const Value& pair) {
    return sort_key(pair.list()->items[by.view() == "key" ? 0 : 1], case_sensitive);
  })};
}

Value unique(const Value& x, Arguments& a) {
  const bool case_sensitive = a.take("case_sensitive", false).truth();
  Dict seen;
  List out;
  for (const Value& item : items_of(x)) {
    const Value key = sort_key(item, case_sensitive);
    if (seen.find(key) != nullptr) continue;
    seen.set(key, true);
    out.items.push_back(item);
  }
  return out;
}

template <bool kLargest>
Value extreme(const Value& x, Arguments& a) {
  const bool case_sensitive = a.take("case_sensitive", false).truth();
  const std::vector<Value> items = items_of(x);
  if (items.empty()) return Undefined{kLargest ? "max" : "min"};
  std::size_t best = 0;
  for (std::size_t i = 1; i < items.size(); ++i) {
    const Value a_key = sort_key(items[i], case_sensitive), b_key = sort_key(items[best], case_sensitive);
    if (kLargest ? less(b_key, a_key) : less(a_key, b_key)) best = i;
  }
  return items[best];
}

Value sum(const Value& x, Arguments& a) {
  const Value attribute = a.take("attribute", None());
  Value out = a.take("start", std::int64_t{0});
  for (const Value& item : items_of(x)) {
    out = arithmetic(Operator::kAdd, out, attribute.is_none() ? item : attribute_of(item, attribute));
  }
  return out;
}

Value absolute(const Value& x, Arguments&) {
  if (!x.is_number()) throw Problem{fmt::format("the absolute value of a {}", x.kind())};
  return x.number() < 0 ? signed_value(x, true) : signed_value(x, false);
}

std::optional<double> parsed_float(std::string_view text) {
  text.remove_prefix(leading_space(text));
  text.remove_suffix(trailing_space(text));
  if (text.starts_with('+')) text.remove_prefix(1);
  double out = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return out;
}

Value to_integer(const Value& x, Arguments& a) {
  const Value fallback = a.take("default", std::int64_t{0});
  if (a.integer("base", 10) != 10) throw Problem{"int with a base other than 10"};
  if (x.is_integer()) return x.integer();
  if (x.text() != nullptr) {
    std::string_view text = x.text()->view();
    text.remove_prefix(leading_space(text));
    text.remove_suffix(trailing_space(text));
    if (text.starts_with('+')) text.remove_prefix(1);
    std::int64_t out = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
    if (error == std::errc() && end == text.data() + text.size()) return out;
  }
  const std::optional<double> number = x.is_number()         ? x.number()
                                       : x.text() != nullptr ? parsed_float(x.text()->view())
                                                             : std::nullopt;
  if (x.is_undefined()) throw Problem{"int of an undefined value"};
  return number && std::fabs(*number) < 9e18 ? Value(static_cast<std::int64_t>(*number)) : fallback;
}

Value to_float(const Value& x, Arguments& a) {
  const Value fallback = a.take("default", 0.0);
  if (x.is_undefined()) throw Problem{"float of an undefined value"};
  if (x.is_number()) return x.number();
  const std::optional<double> number = x.text() != nullptr ? parsed_float(x.text()->view()) : std::nullopt;
  return number ? Value(*number) : fallback;
}

Value trim(const Value& x, Arguments& a) {
  const Value characters = a.take("chars", None());
  return stripped(to_text(x), characters.is_none() ? std::nullopt : std::optional(to_text(characters)), true,
                  true);
}

Value replace(const Value& x, Arguments& a) {
  const MarkedText old = to_text(a.require("old")), by = to_text(a.require("new"));
  const Value count = a.take("count", None());
  if (!count.is_none() && !count.is_integer()) throw Problem{"replace with a count that is no integer"};
  return replaced(to_text(x), old.view(), by, count.is_none() ? -1 : count.integer());
}

Value indent(const Value& x, Arguments& a) {
  if (x.text() == nullptr) throw Problem{fmt::format("indent of a {}; expected a string", x.kind())};
  const Value width = a.take("width", std::int64_t{4});
  const bool first = a.take("first", false).truth(), blank = a.take("blank", false).truth();
  if (width.text() == nullptr && (!width.is_integer() || width.integer() > 1000))
    throw Problem{"indent by a width that is no small integer"};
  const MarkedText space =
      width.text() != nullptr
          ? *width.text()
          : MarkedText(std::string(static_cast<std::size_t>(std::max<std::int64_t>(width.integer(), 0)), ' '),
                       true);
  const MarkedText newline("\n", true);
  MarkedText all = to_text(x), out;
  all.append(newline);
  bool begun = false;
  for (const Value& line : split_lines(all)) {
    if (begun) out.append(newline);
    if (begun ? blank || !line.text()->empty() : first) out.append(space);
    out.append(*line.text());
    begun = true;
  }
  return out;
}

Value tojson(const Value& x, Arguments& a) {
  JsonLayout layout;
  layout.ascii = a.take("ensure_ascii", false).truth();
  const Value indent = a.take("indent", None()), separators = a.take("separators", None());
  layout.sorted = a.take("sort_keys", false).truth();
  if (!indent.is_none()) {
    layout.indent =
        static_cast<int>(std::clamp<std::int64_t>(indent.is_integer() ? indent.integer() : -1, -1, 100));
    if (layout.indent < 0) throw Problem{"tojson with an indent that is no integer of 0 or more"};
    layout.between_items = std::string(1, ',');
  }
  if (!separators.is_none()) {
    const List* pair = separators.list();
    if (pair == nullptr || pair->items.size() != 2) throw Problem{"tojson with separators that are no pair"};
    layout.between_items = std::string(to_text(pair->items[0]).view());
    layout.behind_key = std::string(to_text(pair->items[1]).view());
  }
  return to_json(x, layout);
}

/// Not one of Jinja's: templates that others wrote for DeepSeek-V3.2 use it.
Value parse_json_text(const Value& x, Arguments&) {
  if (x.text() == nullptr) throw Problem{fmt::format("from_json of a {}; expected a string", x.kind())};
  return parse_json(x.text()->view());
}

template <Case kCase>
Value cased(const Value& x, Arguments&) {
  return with_case(to_text(x), kCase);
}

constexpr Builtin kFilters[] = {
    {"abs", true, absolute},
    {"capitalize", false, cased<Case::kCapitalized>},
    {"count", true, length},
    {"d", true, with_default},
    {"default", true, with_default},
    {"dictsort", false, dictsort},
    {"first", true, first},
    {"float", true, to_float},
    {"from_json", false, parse_json_text},
    {"indent", false, indent},
    {"int", true, to_integer},
    {"items", false, items},
    {"join", false, join},
    {"last", true, last},
    {"length", true, length},
    {"list", false, list},
    {"lower", false, cased<Case::kLower>},
    {"map", false, map},
    {"max", false, extreme<true>},
    {"min", false, extreme<false>},
    {"reject", false, select<false, false>},
    {"rejectattr", false, select<true, false>},
    {"replace", false, replace},
    {"reverse", false, reverse},
    {"safe", true, [](const Value& x, Arguments&) -> Value { return to_text(x); }},
    {"select", false, select<false, true>},
    {"selectattr", false, select<true, true>},
    {"sort", false, sort},
    {"string", true, [](const Value& x, Arguments&) -> Value { return to_text(x); }},
    {"sum", false, sum},
    {"tojson", false, tojson},
    {"trim", false, trim},
    {"unique", false, unique},
    {"upper", false, cased<Case::kUpper>}};

}  // namespace

const Builtin* find_filter(std::string_view name) {
  const auto* found = std::ranges::find(kFilters, name, &Builtin::name);
  return found == std::end(kFilters) ? nullptr : found;
}

}  // namespace flash_mla::text::jinja
