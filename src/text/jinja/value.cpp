#include "text/jinja/value.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "text/jinja/characters.h"

namespace flash_mla::text::jinja {
namespace {

constexpr int kMaxDepth = 100;

/// Equal keys have equal texts: 1, 1.0 and True are one key.
std::string hashed(const Value& key) {
  if (const MarkedText* text = key.text()) return fmt::format("s{}", text->view());
  if (key.is_integer()) return fmt::format("n{}", key.integer());
  if (key.is_number()) {
    const double x = key.number();
    return x == std::floor(x) && std::fabs(x) < 9e18 ? fmt::format("n{}", static_cast<std::int64_t>(x))
                                                     : fmt::format("f{}", x);
  }
  if (key.is_none()) return "none";
  throw Problem{fmt::format("a {} as the key of a dict", key.kind())};
}

int checked_depth(int depth) {
  if (depth > kMaxDepth)
    throw Problem{fmt::format("lists and dicts are nested more than {} deep", kMaxDepth)};
  return depth;
}

/// Containers with namespaces in them could come to contain themselves.
void check_item(const Value& value) {
  if (value.name_space() != nullptr || value.method() != nullptr || value.loop() != nullptr ||
      value.macro() != nullptr) {
    throw Problem{fmt::format("a {} within another value", value.kind())};
  }
}

template <class Items>
std::string joined_repr(const Items& items, const char* open, const char* close) {
  std::string out = open;
  for (const Value& item : items) {
    if (out.size() > 1) out += ", ";
    out += repr(item);
  }
  return out + close;
}

std::string text_repr(std::string_view text) {
  const char quote = text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\'';
  std::string out(1, quote);
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == quote || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n' || c == '\r' || c == '\t') {
      out += c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
    } else if (byte < 0x20 || byte == 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out += c;
    }
  }
  return out + quote;
}

}  // namespace

Value::Value(List x) {
  x.depth = 1;
  for (const Value& item : x.items) {
    check_item(item);
    x.depth = std::max(x.depth, checked_depth(item.depth() + 1));
  }
  storage_ = std::make_shared<const List>(std::move(x));
}

Value::Value(Dict x) : storage_(std::make_shared<const Dict>(std::move(x))) {}

std::int64_t Value::integer() const {
  return is<bool>() ? static_cast<std::int64_t>(std::get<bool>(storage_)) : std::get<std::int64_t>(storage_);
}

double Value::number() const {
  return is<double>() ? std::get<double>(storage_) : static_cast<double>(integer());
}

bool Value::truth() const {
  if (is_undefined() || is_none()) return false;
  if (is_number()) return number() != 0;
  if (const MarkedText* x = text()) return !x->empty();
  if (const List* x = list()) return !x->items.empty();
  if (const Dict* x = dict()) return x->size() != 0;
  return true;
}

int Value::depth() const {
  if (const List* x = list()) return x->depth;
  if (const Dict* x = dict()) return x->depth();
  return 0;
}

std::string_view Value::kind() const {
  constexpr std::string_view kNames[] = {"undefined value", "None",   "boolean", "integer",
                                         "number",          "string", "list",    "dict",
                                         "namespace",       "method", "loop",    "macro"};
  static_assert(std::size(kNames) == std::variant_size_v<Storage>);
  return kNames[storage_.index()];
}

std::size_t Dict::place(const Value& key, const std::string& text) const {
  if (!places_.empty()) {
    const auto found = places_.find(text);
    return found == places_.end() ? items_.size() : found->second;
  }
  std::size_t i = 0;
  while (i < items_.size() && !equal(items_[i].first, key)) ++i;
  return i;
}

const Value* Dict::find(const Value& key) const {
  const std::size_t at = place(key, places_.empty() ? "" : hashed(key));
  return at < items_.size() ? &items_[at].second : nullptr;
}

const Value* Dict::find(std::string_view key) const {
  if (!places_.empty()) return find(Value(MarkedText(key, false)));
  for (const auto& [name, value] : items_) {
    if (name.text() != nullptr && name.text()->view() == key) return &value;
  }
  return nullptr;
}

void Dict::set(const Value& key, Value value) {
  check_item(value);
  depth_ = std::max(depth_, checked_depth(value.depth() + 1));
  const std::string text = hashed(key);
  const std::size_t at = place(key, text);
  if (at < items_.size()) {
    items_[at].second = std::move(value);
    return;
  }
  items_.emplace_back(key, std::move(value));
  if (!places_.empty()) {
    places_.emplace(text, at);
  } else if (items_.size() > kSearched) {
    for (std::size_t i = 0; i < items_.size(); ++i) places_.emplace(hashed(items_[i].first), i);
  }
}

bool equal(const Value& a, const Value& b) {
  if (a.is_integer() && b.is_integer()) return a.integer() == b.integer();
  if (a.is_number() && b.is_number()) return a.number() == b.number();
  if (a.text() != nullptr && b.text() != nullptr) return a.text()->view() == b.text()->view();
  if (a.list() != nullptr && b.list() != nullptr) {
    return a.list()->tuple == b.list()->tuple &&
           std::ranges::equal(a.list()->items, b.list()->items,
                              [](const Value& x, const Value& y) { return equal(x, y); });
  }
  if (a.dict() != nullptr && b.dict() != nullptr) {
    return a.dict()->size() == b.dict()->size() &&
           std::ranges::all_of(a.dict()->items(), [&](const auto& item) {
             const Value* other = b.dict()->find(item.first);
             return other != nullptr && equal(item.second, *other);
           });
  }
  if (a.name_space() != nullptr) return a.name_space() == b.name_space();
  if (a.macro() != nullptr) return a.macro() == b.macro();
  return (a.is_undefined() && b.is_undefined()) || (a.is_none() && b.is_none());
}

bool less(const Value& a, const Value& b) {
  if (a.is_integer() && b.is_integer()) return a.integer() < b.integer();
  if (a.is_number() && b.is_number()) return a.number() < b.number();
  if (a.text() != nullptr && b.text() != nullptr) return a.text()->view() < b.text()->view();
  if (a.list() != nullptr && b.list() != nullptr && a.list()->tuple == b.list()->tuple) {
    const auto& x = a.list()->items;
    const auto& y = b.list()->items;
    std::size_t i = 0;
    while (i < x.size() && i < y.size() && equal(x[i], y[i])) ++i;
    return i < x.size() && i < y.size() ? less(x[i], y[i]) : x.size() < y.size();
  }
  throw Problem{fmt::format("a {} and a {} have no order", a.kind(), b.kind())};
}

bool contains(const Value& haystack, const Value& needle) {
  if (const MarkedText* text = haystack.text()) {
    if (needle.text() == nullptr) throw Problem{fmt::format("a {} in a string", needle.kind())};
    return text->view().find(needle.text()->view()) != std::string_view::npos;
  }
  if (const List* list = haystack.list()) {
    return std::ranges::any_of(list->items, [&](const Value& item) { return equal(item, needle); });
  }
  if (const Dict* dict = haystack.dict()) {
    if (needle.is_undefined()) return false;
    hashed(needle);  // refuses what cannot be a key
    return dict->find(needle) != nullptr;
  }
  if (haystack.is_undefined()) return false;
  throw Problem{fmt::format("something in a {}", haystack.kind())};
}

std::string number_text(double x) {
  if (std::isnan(x)) return "nan";
  if (std::isinf(x)) return x < 0 ? "-inf" : "inf";
  char buffer[64];
  // Shortest digits, then laid out as Python does: plain from 1e-4 to 1e16.
  const auto scientific = std::to_chars(buffer, buffer + sizeof(buffer), x, std::chars_format::scientific);
  std::string text(buffer, scientific.ptr);
  const std::size_t e = text.find('e');
  const int exponent = std::stoi(text.substr(e + 1));
  if (exponent < -4 || exponent >= 16) return text;
  const auto plain = std::to_chars(buffer, buffer + sizeof(buffer), x, std::chars_format::fixed);
  text.assign(buffer, plain.ptr);
  if (text.find('.') == text.npos) text.append(".0");
  return text;
}

std::string repr(const Value& value) {
  if (const MarkedText* text = value.text()) return text_repr(text->view());
  if (value.is<bool>()) return value.integer() != 0 ? "True" : "False";
  if (value.is_integer()) return fmt::format("{}", value.integer());
  if (value.is_number()) return number_text(value.number());
  if (value.is_none()) return "None";
  if (value.is_undefined()) return "Undefined";
  if (const List* list = value.list()) {
    if (!list->tuple) return joined_repr(list->items, "[", "]");
    return joined_repr(list->items, "(", list->items.size() == 1 ? ",)" : ")");
  }
  if (const Dict* dict = value.dict()) {
    std::string out = "{";
    for (const auto& [key, item] : dict->items()) {
      if (out.size() > 1) out += ", ";
      out += fmt::format("{}: {}", repr(key), repr(item));
    }
    out.push_back('}');
    return out;
  }
  throw Problem{fmt::format("a {} printed", value.kind())};
}

MarkedText to_text(const Value& value) {
  if (const MarkedText* text = value.text()) return *text;
  if (value.is_undefined()) return {};
  return MarkedText(repr(value), false);
}

std::vector<Value> items_of(const Value& value) {
  if (const List* list = value.list()) return list->items;
  std::vector<Value> out;
  if (const Dict* dict = value.dict()) {
    out.reserve(dict->size());
    for (const auto& item : dict->items()) out.push_back(item.first);
    return out;
  }
  if (const MarkedText* text = value.text()) {
    for (std::size_t at = 0; at < text->size();) {
      const std::size_t next = next_character(text->view(), at);
      out.push_back(text->slice(at, next));
      at = next;
    }
    return out;
  }
  if (value.is_undefined()) return out;
  throw Problem{fmt::format("a {} has no items", value.kind())};
}

}  // namespace flash_mla::text::jinja
