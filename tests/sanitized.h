#pragma once

namespace flash_mla {

/// `usual`, or `sanitized` where ASan and UBSan watch: what takes seconds takes a minute there. They are built with clang,
/// which is used for nothing else.
template <class Usual, class Sanitized>
constexpr auto unless_sanitized([[maybe_unused]] Usual usual, [[maybe_unused]] Sanitized sanitized) {
#if defined(__SANITIZE_ADDRESS__) || defined(__clang__)
  return sanitized;
#else
  return usual;
#endif
}

}  // namespace flash_mla
