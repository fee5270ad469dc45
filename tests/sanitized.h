#pragma once

namespace flash_mla {

/// `usual`, or `sanitized` where sanitizers watch: what takes seconds takes a minute there. They are built with clang,
/// which is used for nothing else.
template <class T>
constexpr T unless_sanitized([[maybe_unused]] T usual, [[maybe_unused]] T sanitized) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(__clang__)
  return sanitized;
#else
  return usual;
#endif
}

}  // namespace flash_mla
