#pragma once

#include <cstddef>
#include <string_view>

namespace flash_mla::transfer {

/// In a time that does not say where two keys of a length differ.
inline bool is_same_key(std::string_view a, std::string_view b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (std::size_t i = 0; i < a.size() && i < b.size(); ++i)
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i]);
  return difference == 0;
}

}  // namespace flash_mla::transfer
