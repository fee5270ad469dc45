#include "text/jinja/arithmetic.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "text/jinja/characters.h"

namespace flash_mla::text::jinja {
namespace {

constexpr std::size_t kMaxRepeated = 1 << 20;  // items or bytes that "*" makes

std::string_view sign_of(Operator op) {
  constexpr std::string_view kSigns[] = {"+", "-", "*", "/", "//", "%"};
  return kSigns[static_cast<std::size_t>(op)];
}

Value integer_result(Operator op, std::int64_t a, std::int64_t b) {
  std::int64_t out = 0;
  bool overflow = false;
  switch (op) {
    case Operator::kAdd:
      overflow = __builtin_add_overflow(a, b, &out);
      break;
    case Operator::kSubtract:
      overflow = __builtin_sub_overflow(a, b, &out);
      break;
    case Operator::kMultiply:
      overflow = __builtin_mul_overflow(a, b, &out);
      break;
    default:
      if (b == 0) throw Problem{"a division by zero"};
      if (op == Operator::kDivide) return static_cast<double>(a) / static_cast<double>(b);
      overflow = b == -1 && a == INT64_MIN;
      if (overflow) break;
      out = op == Operator::kFloorDivide ? a / b : a % b;
      // Python rounds down; a remainder has the divisor's sign.
      if (a % b != 0 && (a < 0) != (b < 0)) out += op == Operator::kFloorDivide ? -1 : b;
  }
  if (overflow) throw Problem{fmt::format("{} {} {} leaves 64 bits", a, sign_of(op), b)};
  return out;
}

Value float_result(Operator op, double a, double b) {
  switch (op) {
    case Operator::kAdd:
      return a + b;
    case Operator::kSubtract:
      return a - b;
    case Operator::kMultiply:
      return a * b;
    default:
      break;
  }
  if (b == 0) throw Problem{"a division by zero"};
  if (op == Operator::kDivide) return a / b;
  double remainder = std::fmod(a, b);
  if (remainder != 0 && (remainder < 0) != (b < 0)) remainder += b;
  if (op == Operator::kModulo) return remainder == 0 ? std::copysign(0.0, b) : remainder;
  return std::floor((a - remainder) / b + 0.5);
}

Value repeated(const Value& value, std::int64_t times) {
  const std::size_t count = static_cast<std::size_t>(std::max<std::int64_t>(times, 0));
  const std::size_t size = value.text() != nullptr ? value.text()->size() : value.list()->items.size();
  if (size > 0 && count > kMaxRepeated / size)
    throw Problem{fmt::format("\"*\" makes more than {} items", kMaxRepeated)};
  if (value.text() != nullptr) {
    MarkedText out;
    for (std::size_t i = 0; i < count; ++i) out.append(*value.text());
    return out;
  }
  List out;
  out.tuple = value.list()->tuple;
  for (std::size_t i = 0; i < count; ++i)
    out.items.insert(out.items.end(), value.list()->items.begin(), value.list()->items.end());
  return out;
}

bool is_sequence(const Value& x) { return x.text() != nullptr || x.list() != nullptr; }

}  // namespace

Value arithmetic(Operator op, const Value& a, const Value& b) {
  if (a.is_integer() && b.is_integer()) return integer_result(op, a.integer(), b.integer());
  if (a.is_number() && b.is_number()) return float_result(op, a.number(), b.number());
  if (op == Operator::kAdd && a.text() != nullptr && b.text() != nullptr) {
    MarkedText out = *a.text();
    out.append(*b.text());
    return out;
  }
  if (op == Operator::kAdd && a.list() != nullptr && b.list() != nullptr &&
      a.list()->tuple == b.list()->tuple) {
    List out = *a.list();
    out.items.insert(out.items.end(), b.list()->items.begin(), b.list()->items.end());
    return out;
  }
  if (op == Operator::kMultiply && is_sequence(a) && b.is_integer()) return repeated(a, b.integer());
  if (op == Operator::kMultiply && is_sequence(b) && a.is_integer()) return repeated(b, a.integer());
  throw Problem{fmt::format("a {} {} a {}", a.kind(), sign_of(op), b.kind())};
}

bool compare(Operator op, const Value& a, const Value& b) {
  switch (op) {
    case Operator::kEqual:
      return equal(a, b);
    case Operator::kNotEqual:
      return !equal(a, b);
    case Operator::kLess:
      return less(a, b);
    case Operator::kLessEqual:
      return less(a, b) || equal(a, b);
    case Operator::kGreater:
      return less(b, a);
    case Operator::kGreaterEqual:
      return less(b, a) || equal(a, b);
    case Operator::kIn:
      return contains(b, a);
    default:
      return !contains(b, a);
  }
}

Value signed_value(const Value& x, bool negate) {
  if (x.is_integer())
    return negate ? integer_result(Operator::kSubtract, 0, x.integer()) : Value(x.integer());
  if (x.is_number()) return negate ? -x.number() : x.number();
  throw Problem{fmt::format("the sign of a {}", x.kind())};
}

Value slice(const Value& self, const Value& begin, const Value& end, const Value& step) {
  if (self.is_undefined() || !is_sequence(self)) {
    if (self.is_undefined()) throw Problem{fmt::format("a slice of an {}", self.kind())};
    throw Problem{fmt::format("a slice of a {}", self.kind())};
  }
  const auto bound = [](const Value& x, std::int64_t fallback) {
    if (x.is_none()) return fallback;
    if (!x.is_integer()) throw Problem{fmt::format("a slice with a {}", x.kind())};
    return x.integer();
  };
  const std::int64_t stride = bound(step, 1);
  if (stride == 0) throw Problem{"a slice with step 0"};
  const std::int64_t size = static_cast<std::int64_t>(
      self.text() != nullptr ? count_characters(self.text()->view()) : self.list()->items.size());
  const std::int64_t low = stride > 0 ? 0 : -1, high = stride > 0 ? size : size - 1;
  const auto placed = [&](const Value& x, std::int64_t fallback) {
    if (x.is_none()) return fallback;
    const std::int64_t at = bound(x, 0);
    return std::clamp(at < 0 ? std::max(at, -size - 1) + size : at, low, high);
  };
  const std::int64_t from = placed(begin, stride > 0 ? low : high), to = placed(end, stride > 0 ? high : low);
  if (self.text() != nullptr && stride == 1) {
    const std::string_view text = self.text()->view();
    const std::size_t first = byte_of_character(text, static_cast<std::size_t>(from));
    const std::size_t count = static_cast<std::size_t>(std::max<std::int64_t>(to - from, 0));
    return self.text()->slice(first, first + byte_of_character(text.substr(first), count));
  }
  const std::vector<Value> items = items_of(self);
  List out;
  MarkedText text;
  for (std::int64_t i = from; stride > 0 ? i < to : i > to;) {
    const Value& item = items[static_cast<std::size_t>(i)];
    if (self.text() != nullptr) {
      text.append(*item.text());
    } else {
      out.items.push_back(item);
    }
    if (__builtin_add_overflow(i, stride, &i)) break;
  }
  if (self.text() != nullptr) return text;
  out.tuple = self.list()->tuple;
  return out;
}

}  // namespace flash_mla::text::jinja
