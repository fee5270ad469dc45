#include "text/jinja/json_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <variant>

#include "text/utf8.h"

namespace flash_mla::text::jinja {
namespace {

constexpr std::size_t kMaxDepth = 64;  // of JSON in a text

class Writer {
 public:
  explicit Writer(const JsonLayout& layout) : layout_(layout) {}
  std::string out;

  void write(const Value& value, int depth) {
    if (const MarkedText* text = value.text()) {
      write_text(text->view());
    } else if (value.is_none()) {
      out += "null";
    } else if (value.is<bool>()) {
      out += value.truth() ? "true" : "false";
    } else if (value.is_integer()) {
      out += fmt::format("{}", value.integer());
    } else if (value.is_number()) {
      const double x = value.number();
      out += std::isnan(x) ? "NaN" : std::isinf(x) ? (x < 0 ? "-Infinity" : "Infinity") : number_text(x);
    } else if (const List* list = value.list()) {
      write_items(list->items, '[', ']', depth, [&](const Value& item) { write(item, depth + 1); });
    } else if (value.dict() != nullptr) {
      write_dict(*value.dict(), depth);
    } else {
      throw Problem{fmt::format("a {} as JSON", value.kind())};
    }
  }

 private:
  void new_line(int depth) {
    out += '\n';
    out.append(static_cast<std::size_t>(layout_.indent * depth), ' ');
  }

  template <class Items, class F>
  void write_items(const Items& items, char open, char close, int depth, const F& write_item) {
    out += open;
    bool first = true;
    for (const auto& item : items) {
      if (!first) out += layout_.between_items;
      first = false;
      if (layout_.indent >= 0) new_line(depth + 1);
      write_item(item);
    }
    if (layout_.indent >= 0 && !first) new_line(depth);
    out += close;
  }

  void write_dict(const Dict& dict, int depth) {
    auto items = dict.items();
    if (layout_.sorted) {
      std::ranges::stable_sort(items, [](const auto& a, const auto& b) { return less(a.first, b.first); });
    }
    write_items(items, '{', '}', depth, [&](const auto& item) {
      if (item.first.text() != nullptr) {
        write_text(item.first.text()->view());
      } else {
        out += '"';
        write(item.first, depth);
        out += '"';
      }
      out += layout_.behind_key;
      write(item.second, depth + 1);
    });
  }

  void write_text(std::string_view text) {
    out += '"';
    for (const char c : text) {
      constexpr std::string_view kSpecial = "\"\\\n\r\t\f\b", kLetters = "\"\\nrtfb";
      if (const std::size_t known = kSpecial.find(c); known != kSpecial.npos) {
        out += '\\';
        out += kLetters[known];
      } else if (static_cast<unsigned char>(c) < 0x20) {
        out += fmt::format("\\u{:04x}", static_cast<unsigned char>(c));
      } else {
        out += c;
      }
    }
    out += '"';
  }

  const JsonLayout& layout_;
};

/// Without characters outside ASCII, which in JSON only strings have.
std::string escaped(std::string_view json) {
  std::string out;
  for (const char32_t c : utf8_to_code_points(json)) {
    if (c < 0x80) {
      out += static_cast<char>(c);
    } else if (c < 0x10000) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      const auto rest = static_cast<unsigned>(c) - 0x10000;
      out += fmt::format("\\u{:04x}\\u{:04x}", 0xD800 + (rest >> 10), 0xDC00 + (rest & 0x3FF));
    }
  }
  return out;
}

/// Builds a value as the parser meets its pieces. (nlohmann::ordered_json searches an object's keys one by one:
/// of a client's text that takes time in proportion to the square of its length.)
class Builder {
 public:
  using Parser = nlohmann::json;

  bool null() { return add(None()); }
  bool boolean(bool x) { return add(x); }
  bool number_integer(Parser::number_integer_t x) { return add(std::int64_t{x}); }
  bool number_unsigned(Parser::number_unsigned_t x) {
    if (x > INT64_MAX) throw too_large(x);
    return add(static_cast<std::int64_t>(x));
  }
  bool number_float(Parser::number_float_t x, const std::string&) { return add(x); }
  bool string(std::string& x) { return add(MarkedText(x, false)); }
  bool binary(Parser::binary_t&) { return false; }
  bool start_object(std::size_t) { return open(Dict()); }
  bool key(std::string& x) {
    open_.back().key = x;
    return true;
  }
  bool end_object() { return close(); }
  bool start_array(std::size_t) { return open(List()); }
  bool end_array() { return close(); }
  bool parse_error(std::size_t, const std::string&, const Parser::exception&) { return false; }

  static Problem too_large(std::uint64_t x) {
    return Problem{fmt::format("the number {}; expected at most 2^63 - 1", x)};
  }
  Value take() { return std::move(result_); }

 private:
  struct Open {
    std::variant<List, Dict> container;
    std::string key;  // of the next item of a dict
  };

  template <class Container>
  bool open(Container container) {
    if (open_.size() == kMaxDepth) throw Problem{fmt::format("JSON is nested more than {} deep", kMaxDepth)};
    open_.push_back({std::move(container), ""});
    return true;
  }
  bool close() {
    Open last = std::move(open_.back());
    open_.pop_back();
    return add(std::visit([](auto& container) { return Value(std::move(container)); }, last.container));
  }
  bool add(Value value) {
    if (open_.empty()) {
      result_ = std::move(value);
    } else if (auto* list = std::get_if<List>(&open_.back().container)) {
      list->items.push_back(std::move(value));
    } else {
      std::get<Dict>(open_.back().container).set(MarkedText(open_.back().key, false), std::move(value));
    }
    return true;
  }

  std::vector<Open> open_;
  Value result_;
};

}  // namespace

Value from_json(const nlohmann::ordered_json& json) {
  if (json.is_null()) return None();
  if (json.is_boolean()) return json.get<bool>();
  if (json.is_string()) return MarkedText(json.get_ref<const std::string&>(), false);
  if (json.is_number_float()) return json.get<double>();
  if (json.is_number_unsigned() && json.get<std::uint64_t>() > INT64_MAX) {
    throw Builder::too_large(json.get<std::uint64_t>());
  }
  if (json.is_number()) return json.get<std::int64_t>();
  if (json.is_array()) {
    List out;
    out.items.reserve(json.size());
    for (const auto& item : json) out.items.push_back(from_json(item));
    return out;
  }
  Dict out;
  for (const auto& [key, item] : json.items()) out.set(MarkedText(key, false), from_json(item));
  return out;
}

Value parse_json(std::string_view text) {
  Builder builder;
  if (!nlohmann::json::sax_parse(text, &builder)) throw Problem{"a string that is no JSON"};
  return builder.take();
}

MarkedText to_json(const Value& value, const JsonLayout& layout) {
  Writer writer(layout);
  writer.write(value, 0);
  return {layout.ascii ? escaped(writer.out) : writer.out, false};
}

}  // namespace flash_mla::text::jinja
