#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "text/jinja/marked_text.h"

namespace flash_mla::text::jinja {

class Value;
struct Macro;
struct Loop;

/// What is wrong with a value while a template is rendered; the renderer adds the line.
struct Problem {
  std::string what;
  bool raised = false;  ///< by raise_exception: the template's own words
};

/// A name or field that is not there: prints as nothing, is false, and refuses everything else.
struct Undefined {
  std::string name;
};
struct None {};

/// A list, or a tuple.
struct List {
  std::vector<Value> items;
  bool tuple = false;
  int depth = 1;  ///< of containers within each other
};

/// Items in the order in which they were added.
class Dict {
 public:
  const Value* find(const Value& key) const;
  const Value* find(std::string_view key) const;
  void set(const Value& key, Value value);
  const std::vector<std::pair<Value, Value>>& items() const;
  std::size_t size() const;
  int depth() const { return depth_; }

 private:
  std::size_t place(const Value& key, const std::string& hashed) const;

  static constexpr std::size_t kSearched = 8;  // as few items are searched one by one
  std::vector<std::pair<Value, Value>> items_;
  std::unordered_map<std::string, std::size_t> places_;  // by hashed key, if there are more
  int depth_ = 1;
};

/// namespace(...): the one kind of value that a template can change.
struct Namespace {
  Dict attributes;
};

/// A method that was looked up, and not (yet) called.
struct Method {
  std::shared_ptr<const Value> self;
  std::string name;
};

/// What a template computes with, as Python has it. Integers are of 64 bits.
class Value {
 public:
  using Storage =
      std::variant<Undefined, None, bool, std::int64_t, double, MarkedText, std::shared_ptr<const List>,
                   std::shared_ptr<const Dict>, std::shared_ptr<Namespace>, std::shared_ptr<const Method>,
                   std::shared_ptr<const Loop>, const Macro*>;

  Value() = default;  ///< undefined, without a name
  Value(Undefined x) : storage_(std::move(x)) {}
  Value(None x) : storage_(x) {}
  Value(bool x) : storage_(x) {}
  Value(std::int64_t x) : storage_(x) {}
  Value(double x) : storage_(x) {}
  Value(MarkedText x) : storage_(std::move(x)) {}
  Value(const char*) = delete;
  /// Throw Problem for containers that are nested too deep.
  Value(List x);
  Value(Dict x);
  Value(std::shared_ptr<Namespace> x) : storage_(std::move(x)) {}
  Value(Method x) : storage_(std::make_shared<const Method>(std::move(x))) {}
  Value(std::shared_ptr<const Loop> x) : storage_(std::move(x)) {}
  Value(const Macro* x) : storage_(x) {}

  template <class T>
  bool is() const {
    return std::holds_alternative<T>(storage_);
  }
  bool is_undefined() const { return is<Undefined>(); }
  bool is_none() const { return is<None>(); }
  bool is_integer() const { return is<std::int64_t>() || is<bool>(); }  ///< True counts as 1
  bool is_number() const { return is_integer() || is<double>(); }
  const MarkedText* text() const { return std::get_if<MarkedText>(&storage_); }
  const List* list() const { return pointee<const List>(); }
  std::shared_ptr<const List> shared_list() const { return std::get<std::shared_ptr<const List>>(storage_); }
  const Dict* dict() const { return pointee<const Dict>(); }
  Namespace* name_space() const { return pointee<Namespace>(); }
  const Method* method() const { return pointee<const Method>(); }
  const Loop* loop() const { return pointee<const Loop>(); }
  const Macro* macro() const { return is<const Macro*>() ? std::get<const Macro*>(storage_) : nullptr; }

  std::int64_t integer() const;  ///< of one that is_integer()
  double number() const;         ///< of one that is_number()
  bool truth() const;
  int depth() const;  ///< of containers within each other; 0 for what is none
  /// "string", "list", ...: what it is, as errors say it.
  std::string_view kind() const;

 private:
  template <class T>
  T* pointee() const {
    const auto* pointer = std::get_if<std::shared_ptr<T>>(&storage_);
    return pointer == nullptr ? nullptr : pointer->get();
  }
  Storage storage_;
};

inline const std::vector<std::pair<Value, Value>>& Dict::items() const { return items_; }
inline std::size_t Dict::size() const { return items_.size(); }

/// The place of one iteration of a for loop.
struct Loop {
  std::shared_ptr<const std::vector<Value>> items;
  std::size_t index = 0;
  int depth = 1;
};

bool equal(const Value& a, const Value& b);
/// Whether a < b. Throws Problem where the kinds have no order.
bool less(const Value& a, const Value& b);
/// `needle in haystack`.
bool contains(const Value& haystack, const Value& needle);

/// What {{ value }} prints. Whatever is not the template's own text is not control.
MarkedText to_text(const Value& value);
/// Python's repr, which is what stands within printed lists.
std::string repr(const Value& value);
std::string number_text(double x);

/// The items that a loop over it sees: of a list, the keys of a dict, the characters of a string.
std::vector<Value> items_of(const Value& value);

}  // namespace flash_mla::text::jinja
