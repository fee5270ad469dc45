#pragma once

#include <functional>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "text/jinja/value.h"

namespace flash_mla::text::jinja {

/// The arguments of a call, taken one after another by the names that Python's signature gives them.
class Arguments {
 public:
  std::vector<Value> positional;
  std::vector<std::pair<std::string_view, Value>> named;

  /// The next parameter: nothing if it is not given.
  std::optional<Value> take(std::string_view name);
  Value take(std::string_view name, Value fallback) { return take(name).value_or(std::move(fallback)); }
  Value require(std::string_view name);
  /// A string, an integer: throw Problem for a value of another kind.
  MarkedText text(std::string_view name);
  std::int64_t integer(std::string_view name, std::int64_t fallback);
  /// Throws Problem if arguments are left that no call above took.
  void finish() const;

 private:
  std::size_t taken_ = 0;
};

/// A filter, test or function. `name` is what a template calls it.
struct Builtin {
  std::string_view name;
  bool quick;  ///< takes the same time whatever the size of self
  /// Of a filter or test, `self` is what stands before "|" or "is".
  Value (*run)(const Value& self, Arguments& arguments);
};

/// Null for one that this library does not have.
const Builtin* find_filter(std::string_view name);
const Builtin* find_test(std::string_view name);
const Builtin* find_function(std::string_view name);
/// Whether strings, dicts or lists have such a method.
bool is_method(std::string_view name);
/// Whether `value` itself has it.
bool has_method(const Value& value, std::string_view name);
/// Throws Problem if it has none.
Value call_method(const Value& self, std::string_view name, Arguments& arguments);

/// self.name and self[key]; undefined if there is no such thing.
Value field_of(const Value& self, std::string_view name);
Value item_of(const Value& self, const Value& key);

}  // namespace flash_mla::text::jinja
