#include "text/jinja/builtins.h"

#include <fmt/format.h>

#include <algorithm>
#include <ctime>

#include "text/jinja/characters.h"

namespace flash_mla::text::jinja {

// ------------------------------------------------------------------------------------- arguments

std::optional<Value> Arguments::take(std::string_view name) {
  const auto found = std::ranges::find(named, name, &std::pair<std::string_view, Value>::first);
  if (taken_ < positional.size()) {
    if (found != named.end()) throw Problem{fmt::format("the argument \"{}\" twice", name)};
    return positional[taken_++];
  }
  if (found == named.end()) return std::nullopt;
  Value out = std::move(found->second);
  named.erase(found);
  return out;
}

Value Arguments::require(std::string_view name) {
  std::optional<Value> out = take(name);
  if (!out) throw Problem{fmt::format("a call without the argument \"{}\"", name)};
  return std::move(*out);
}

MarkedText Arguments::text(std::string_view name) {
  const Value value = require(name);
  if (value.text() == nullptr)
    throw Problem{fmt::format("{} is a {}; expected a string", name, value.kind())};
  return *value.text();
}

std::int64_t Arguments::integer(std::string_view name, std::int64_t fallback) {
  const Value value = take(name, fallback);
  if (!value.is_integer()) throw Problem{fmt::format("{} is a {}; expected an integer", name, value.kind())};
  return value.integer();
}

void Arguments::finish() const {
  if (taken_ < positional.size()) {
    throw Problem{fmt::format("a call with {} arguments; expected at most {}", positional.size(), taken_)};
  }
  if (!named.empty())
    throw Problem{fmt::format("the argument \"{}\", which the call does not take", named.front().first)};
}

// ------------------------------------------------------------------------------ fields and items

namespace {

Value loop_field(const Loop& loop, std::string_view name) {
  const auto index = static_cast<std::int64_t>(loop.index),
             length = static_cast<std::int64_t>(loop.items->size());
  const auto item = [&](std::int64_t at, const char* what) -> Value {
    if (at < 0 || at >= length) return Undefined{what};
    return (*loop.items)[static_cast<std::size_t>(at)];
  };
  if (name == "index") return index + 1;
  if (name == "index0") return index;
  if (name == "revindex") return length - index;
  if (name == "revindex0") return length - index - 1;
  if (name == "first") return index == 0;
  if (name == "last") return index + 1 == length;
  if (name == "length") return length;
  if (name == "depth") return static_cast<std::int64_t>(loop.depth);
  if (name == "depth0") return static_cast<std::int64_t>(loop.depth - 1);
  if (name == "previtem") return item(index - 1, "loop.previtem");
  if (name == "nextitem") return item(index + 1, "loop.nextitem");
  throw Problem{fmt::format("loop.{}", name)};
}

}  // namespace

Value field_of(const Value& self, std::string_view name) {
  if (self.is_undefined()) throw Problem{fmt::format("the field \"{}\" of an undefined value", name)};
  if (self.loop() != nullptr) return loop_field(*self.loop(), name);
  if (has_method(self, name)) return Method{std::make_shared<const Value>(self), std::string(name)};
  const Dict* fields = self.name_space() != nullptr ? &self.name_space()->attributes : self.dict();
  const Value* found = fields != nullptr ? fields->find(name) : nullptr;
  return found != nullptr ? *found : Value(Undefined{std::string(name)});
}

Value item_of(const Value& self, const Value& key) {
  if (self.is_undefined()) throw Problem{"an item of an undefined value"};
  if (self.dict() != nullptr) {
    const bool possible = key.text() != nullptr || key.is_number() || key.is_none();
    if (const Value* found = possible ? self.dict()->find(key) : nullptr) return *found;
  }
  if (key.text() != nullptr) {
    if (self.dict() != nullptr && !has_method(self, key.text()->view()))
      return Undefined{std::string(key.text()->view())};
    return field_of(self, key.text()->view());
  }
  if (!key.is_integer() || (self.list() == nullptr && self.text() == nullptr)) return Undefined{repr(key)};
  std::int64_t at = key.integer();
  const std::size_t size =
      self.list() != nullptr ? self.list()->items.size() : count_characters(self.text()->view());
  if (at < 0) at += static_cast<std::int64_t>(size);
  if (at < 0 || static_cast<std::size_t>(at) >= size) return Undefined{repr(key)};
  if (self.list() != nullptr) return self.list()->items[static_cast<std::size_t>(at)];
  const std::string_view text = self.text()->view();
  const std::size_t begin = byte_of_character(text, static_cast<std::size_t>(at));
  return self.text()->slice(begin, next_character(text, begin));
}

// ------------------------------------------------------------------------------------- functions

namespace {

Value range(const Value&, Arguments& a) {
  constexpr std::int64_t kMaxItems = 100'000;  // Jinja's sandbox has the same bound
  const std::int64_t first = a.integer("start", 0);
  const std::optional<Value> second = a.take("stop");
  if (second && !second->is_integer()) throw Problem{"range of something that is no integer"};
  const std::int64_t step = a.integer("step", 1);
  const std::int64_t begin = second ? first : 0, end = second ? second->integer() : first;
  if (step == 0) throw Problem{"range with step 0"};
  List out;
  for (std::int64_t i = begin; step > 0 ? i < end : i > end;) {
    if (static_cast<std::int64_t>(out.items.size()) >= kMaxItems)
      throw Problem{fmt::format("range of more than {} items", kMaxItems)};
    out.items.push_back(i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  return out;
}

Dict named_items(Arguments& a) {
  Dict out;
  if (const std::optional<Value> items = a.take("")) {
    if (items->dict() == nullptr)
      throw Problem{fmt::format("the items of a {}; expected a dict", items->kind())};
    out = *items->dict();
  }
  for (auto& [name, value] : a.named) out.set(MarkedText(name, true), std::move(value));
  a.named.clear();
  return out;
}

Value make_namespace(const Value&, Arguments& a) {
  auto out = std::make_shared<Namespace>();
  out->attributes = named_items(a);
  return out;
}

Value make_dict(const Value&, Arguments& a) { return named_items(a); }

Value raise_exception(const Value&, Arguments& a) {
  throw Problem{std::string(to_text(a.require("message")).view()), /*raised=*/true};
}

Value strftime_now(const Value&, Arguments& a) {
  const std::string format(a.text("format").view());
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  char out[256];
  const std::size_t size = format.empty() ? 0 : std::strftime(out, sizeof(out), format.c_str(), &local);
  if (size == 0 && !format.empty()) throw Problem{"strftime_now with a format of more than 255 characters"};
  return MarkedText({out, size}, true);
}

constexpr Builtin kFunctions[] = {{"dict", true, make_dict},
                                  {"namespace", true, make_namespace},
                                  {"raise_exception", true, raise_exception},
                                  {"range", true, range},
                                  {"strftime_now", true, strftime_now}};

}  // namespace

const Builtin* find_function(std::string_view name) {
  const auto* found = std::ranges::find(kFunctions, name, &Builtin::name);
  return found == std::end(kFunctions) ? nullptr : found;
}

// ----------------------------------------------------------------------------------------- tests

namespace {

std::int64_t integer_of(const Value& x) {
  if (!x.is_integer()) throw Problem{fmt::format("a {}; expected an integer", x.kind())};
  return x.integer();
}

bool is_sequence(const Value& x) {
  return x.text() != nullptr || x.list() != nullptr || x.dict() != nullptr || x.is_undefined();
}

template <bool (*kCompare)(const Value&, const Value&)>
Value compared(const Value& x, Arguments& a) {
  return kCompare(x, a.require("other"));
}
bool not_equal(const Value& a, const Value& b) { return !equal(a, b); }
bool at_most(const Value& a, const Value& b) { return less(a, b) || equal(a, b); }
bool more(const Value& a, const Value& b) { return less(b, a); }
bool at_least(const Value& a, const Value& b) { return at_most(b, a); }
bool within(const Value& a, const Value& b) { return contains(b, a); }

bool is_cased(const Value& x, bool upper) {
  bool any = false;
  const MarkedText text = to_text(x);
  for (const char c : text.view()) {
    const bool big = c >= 'A' && c <= 'Z', small = c >= 'a' && c <= 'z';
    if (upper ? small : big) return false;
    any = any || big || small;
  }
  return any;
}

constexpr Builtin kTests[] = {
    {"!=", true, compared<not_equal>},
    {"<", true, compared<less>},
    {"<=", true, compared<at_most>},
    {"==", true, compared<equal>},
    {">", true, compared<more>},
    {">=", true, compared<at_least>},
    {"boolean", true, [](const Value& x, Arguments&) -> Value { return x.is<bool>(); }},
    {"callable", true,
     [](const Value& x, Arguments&) -> Value { return x.macro() != nullptr || x.method() != nullptr; }},
    {"defined", true, [](const Value& x, Arguments&) -> Value { return !x.is_undefined(); }},
    {"divisibleby", true,
     [](const Value& x, Arguments& a) -> Value {
       const std::int64_t divisor = integer_of(a.require("num"));
       if (divisor == 0) throw Problem{"a division by zero"};
       return divisor == -1 || integer_of(x) % divisor == 0;
     }},
    {"eq", true, compared<equal>},
    {"equalto", true, compared<equal>},
    {"even", true, [](const Value& x, Arguments&) -> Value { return integer_of(x) % 2 == 0; }},
    {"false", true, [](const Value& x, Arguments&) -> Value { return x.is<bool>() && !x.truth(); }},
    {"float", true, [](const Value& x, Arguments&) -> Value { return x.is<double>(); }},
    {"ge", true, compared<at_least>},
    {"gt", true, compared<more>},
    {"in", false, compared<within>},
    {"integer", true, [](const Value& x, Arguments&) -> Value { return x.is<std::int64_t>(); }},
    {"iterable", true,
     [](const Value& x, Arguments&) -> Value { return is_sequence(x) || x.loop() != nullptr; }},
    {"le", true, compared<at_most>},
    {"lower", false, [](const Value& x, Arguments&) -> Value { return is_cased(x, false); }},
    {"lt", true, compared<less>},
    {"mapping", true, [](const Value& x, Arguments&) -> Value { return x.dict() != nullptr; }},
    {"ne", true, compared<not_equal>},
    {"none", true, [](const Value& x, Arguments&) -> Value { return x.is_none(); }},
    {"number", true, [](const Value& x, Arguments&) -> Value { return x.is_number(); }},
    {"odd", true, [](const Value& x, Arguments&) -> Value { return integer_of(x) % 2 != 0; }},
    {"sequence", true, [](const Value& x, Arguments&) -> Value { return is_sequence(x); }},
    {"string", true, [](const Value& x, Arguments&) -> Value { return x.text() != nullptr; }},
    {"true", true, [](const Value& x, Arguments&) -> Value { return x.is<bool>() && x.truth(); }},
    {"undefined", true, [](const Value& x, Arguments&) -> Value { return x.is_undefined(); }},
    {"upper", false, [](const Value& x, Arguments&) -> Value { return is_cased(x, true); }}};

}  // namespace

const Builtin* find_test(std::string_view name) {
  const auto* found = std::ranges::find(kTests, name, &Builtin::name);
  return found == std::end(kTests) ? nullptr : found;
}

}  // namespace flash_mla::text::jinja
