// The k largest of a row in four passes over it: the keys' highest 11 bits are counted, then the middle 11 of
// those that share the boundary's highest, then the lowest 10, which gives the boundary's key exactly; the last
// pass writes the positions above it, and of those equal to it the first. 32 KiB of counters are all the memory,
// whatever the scores are.

#include <algorithm>
#include <array>
#include <cstring>

#include "flash_mla/info.h"
#include "kernels/attention/top_k/cpu/top_k.h"
#include "kernels/attention/top_k/order_key.h"

// This file is compiled once for each instruction set.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention/top_k/cpu/select_row.cpp"
#include <hwy/foreach_target.h>
//
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace flash_mla::cpu {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::ScalableTag<float>;
using U = hn::RebindToUnsigned<F>;
using I = hn::RebindToSigned<F>;

/// order_key of order_key.h on a vector.
HWY_INLINE hn::Vec<U> OrderKey(hn::Vec<F> scores) {
  const U du;
  const I di;
  const auto bits = hn::BitCast(du, scores);
  const auto top = hn::Set(du, 0x80000000u);
  const auto magnitude = hn::AndNot(top, bits);
  const auto sign = hn::BitCast(du, hn::ShiftRight<31>(hn::BitCast(di, bits)));
  auto key = hn::Xor(bits, hn::Or(sign, top));
  key = hn::IfThenElse(hn::Eq(magnitude, hn::Zero(du)), hn::Set(du, selection::kZeroKey), key);
  // Magnitudes are positive as signed numbers, which every instruction set compares.
  const auto nan = hn::RebindMask(du, hn::Gt(hn::BitCast(di, magnitude), hn::Set(di, 0x7F800000)));
  return hn::IfThenElse(nan, hn::Set(du, selection::kNanKey), key);
}

/// Counters of a digit. Four tables take turns, so that a run of equal keys does not wait for itself.
class Histogram {
 public:
  static constexpr std::size_t kDigits = 2048, kTables = 4;

  void clear() { std::memset(tables_, 0, sizeof(tables_)); }
  void count(std::uint32_t digit) { ++tables_[0][digit]; }
  void count(const std::uint32_t* digits, std::size_t n) {
    const std::size_t whole = n / kTables * kTables;
    for (std::size_t i = 0; i < whole; i += kTables) {
      for (std::size_t t = 0; t < kTables; ++t) ++tables_[t][digits[i + t]];
    }
    for (std::size_t i = whole; i < n; ++i) ++tables_[0][digits[i]];
  }
  /// The digit at which `wanted` keys, counted from the highest, are reached. `wanted` becomes how many of the
  /// digit's own keys they include; `in_digit`, how many it has.
  std::uint32_t reach(std::int64_t* wanted, std::int64_t* in_digit) const {
    for (std::size_t d = kDigits; d-- > 0;) {
      const std::int64_t n = std::int64_t{tables_[0][d]} + tables_[1][d] + tables_[2][d] + tables_[3][d];
      if (n >= *wanted) {
        *in_digit = n;
        return static_cast<std::uint32_t>(d);
      }
      *wanted -= n;
    }
    *in_digit = 0;
    return 0;
  }

 private:
  std::uint32_t tables_[kTables][kDigits];
};

/// Counts the digit at kShift of the scores whose keys above it are `prefix`.
template <int kShift, int kPrefixShift>
void CountDigits(const float* scores, std::int64_t n, std::uint32_t prefix, Histogram& histogram) {
  const F d;
  const U du;
  constexpr std::uint32_t kMask = (kPrefixShift == 32 ? ~0u : (1u << (kPrefixShift % 32)) - 1) >> kShift;
  constexpr std::size_t kVectors = 4;
  const std::size_t lanes = hn::Lanes(d);
  // CompressStore may write a whole vector past what it keeps.
  HWY_ALIGN std::uint32_t digits[(kVectors + 1) * hn::MaxLanes(U())];
  histogram.clear();
  std::int64_t i = 0;
  const auto step = static_cast<std::int64_t>(kVectors * lanes);
  for (; i + step <= n; i += step) {
    std::size_t found = 0;
    for (std::size_t v = 0; v < kVectors; ++v) {
      const auto key = OrderKey(hn::LoadU(d, scores + i + static_cast<std::int64_t>(v * lanes)));
      const auto digit = hn::And(hn::ShiftRight<kShift>(key), hn::Set(du, kMask));
      if constexpr (kPrefixShift == 32) {
        hn::StoreU(digit, du, digits + found);
        found += lanes;
      } else {
        const auto same = hn::Eq(hn::ShiftRight<kPrefixShift % 32>(key), hn::Set(du, prefix));
        found += hn::CompressStore(digit, same, du, digits + found);
      }
    }
    histogram.count(digits, found);
  }
  for (; i < n; ++i) {
    const std::uint32_t key = selection::order_key(scores[i]);
    if (kPrefixShift != 32 && key >> (kPrefixShift % 32) != prefix) continue;
    histogram.count((key >> kShift) & kMask);
  }
}

/// Writes the positions of keys above `boundary`, and of the first `ties` that equal it.
void WritePositions(const float* scores, std::int64_t n, std::int64_t k, std::uint32_t boundary,
                    std::int64_t ties, std::int32_t* positions) {
  const F d;
  const U du;
  const I di;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto limit = hn::Set(du, boundary);
  std::int64_t written = 0, i = 0;
  for (; i + lanes <= n && written < k; i += lanes) {
    const auto key = OrderKey(hn::LoadU(d, scores + i));
    auto take = hn::Gt(key, limit);
    if (ties > 0) {
      const auto equal = hn::Eq(key, limit);
      const auto count = static_cast<std::int64_t>(hn::CountTrue(du, equal));
      // Those of this vector may be more than are still wanted: then one by one.
      if (count > ties) break;
      ties -= count;
      take = hn::Or(take, equal);
    }
    if (hn::AllFalse(du, take)) continue;
    const auto at = hn::Iota(di, static_cast<std::int32_t>(i));
    written +=
        static_cast<std::int64_t>(hn::CompressStore(at, hn::RebindMask(di, take), di, positions + written));
  }
  const auto one = [&](std::int64_t at) {
    const std::uint32_t key = selection::order_key(scores[at]);
    if (key < boundary || (key == boundary && ties == 0)) return;
    if (key == boundary) --ties;
    positions[written++] = static_cast<std::int32_t>(at);
  };
  const std::int64_t split = std::min(i + lanes, n);
  for (; i < split && written < k; ++i) one(i);
  for (; i + lanes <= n && written < k; i += lanes) {
    const auto take = hn::Gt(OrderKey(hn::LoadU(d, scores + i)), limit);
    if (hn::AllFalse(du, take)) continue;
    const auto at = hn::Iota(di, static_cast<std::int32_t>(i));
    written +=
        static_cast<std::int64_t>(hn::CompressStore(at, hn::RebindMask(di, take), di, positions + written));
  }
  for (; i < n && written < k; ++i) one(i);
}

void SelectRow(const float* scores, std::int64_t n, std::int64_t k, std::int32_t* positions) {
  static_assert(hn::MaxLanes(I()) <= kSelectSlack);
  Histogram histogram;
  std::int64_t wanted = k, in_digit = 0;
  CountDigits<21, 32>(scores, n, 0, histogram);
  std::uint32_t boundary = histogram.reach(&wanted, &in_digit);
  int shift = 21;
  // Where all of a digit's keys are wanted its lower bits decide nothing.
  if (in_digit != wanted) {
    CountDigits<10, 21>(scores, n, boundary, histogram);
    boundary = boundary << 11 | histogram.reach(&wanted, &in_digit);
    shift = 10;
  }
  if (in_digit != wanted) {
    CountDigits<0, 10>(scores, n, boundary, histogram);
    boundary = boundary << 10 | histogram.reach(&wanted, &in_digit);
    shift = 0;
  }
  boundary <<= shift;
  // All keys from the boundary up: none is its equal if it moves down by one, for no key is 0.
  if (in_digit == wanted) return WritePositions(scores, n, k, boundary - 1, 0, positions);
  WritePositions(scores, n, k, boundary, wanted, positions);
}

}  // namespace

extern void (*const kSelectRow)(const float*, std::int64_t, std::int64_t, std::int32_t*);
void (*const kSelectRow)(const float*, std::int64_t, std::int64_t, std::int32_t*) = SelectRow;

}  // namespace HWY_NAMESPACE
}  // namespace flash_mla::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_mla::cpu {

void select_row(const float* scores, std::int64_t n, std::int64_t k, std::int32_t* positions) {
  static const auto chosen = [] {
    [[maybe_unused]] const std::string isa = cpu_isa().selected;
#if HWY_TARGETS & HWY_AVX3
    if (isa.starts_with("avx512")) return N_AVX3::kSelectRow;
#endif
#if HWY_TARGETS & HWY_AVX2
    if (isa.starts_with("avx")) return N_AVX2::kSelectRow;
#endif
    return HWY_NAMESPACE::kSelectRow;  // here that of HWY_STATIC_TARGET
  }();
  chosen(scores, n, k, positions);
}

}  // namespace flash_mla::cpu
#endif  // HWY_ONCE
