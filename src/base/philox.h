#pragma once

#include <array>
#include <cstdint>

namespace flash_mla {

/// Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): 128
/// random bits as a pure function of counter and key, so a draw needs no state that a batch could disturb.
constexpr std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                              std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

/// A number in [0, 1) with 53 random bits for the token at `position` of continuation `index`; `use` tells apart what one
/// token needs several numbers for.
constexpr double uniform(std::uint64_t seed, std::uint32_t index, std::uint64_t position,
                         std::uint32_t use = 0) {
  const auto bits =
      philox({static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32), index, use},
             {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  const std::uint64_t joined = (std::uint64_t{bits[0]} << 32 | bits[1]) >> 11;
  return static_cast<double>(joined) * 0x1p-53;
}

}  // namespace flash_mla
