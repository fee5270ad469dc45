#pragma once

#include <cstddef>
#include <cstdint>

namespace flash_mla::sm90 {

/// Ranks that see each other's memory: of one host, or, in tests, streams of one GPU.
inline constexpr int kMaxPeers = 8;

/// How the CTAs of one number meet those of the other ranks (meeting.cuh).
struct Peers {
  int rank = 0, size = 1;
  /// peer_flags bytes in the memory of each rank, zero before the first call. Kernels that wait for each other on one stream
  /// of every rank share them.
  std::uint32_t* flags[kMaxPeers] = {};
  /// A word that all ranks see, of the host's memory, or null. Not 0: the group has failed, and nobody waits any more; whoever
  /// waits for longer than `timeout_ns`, if that is not 0, sets it.
  std::uint32_t* failed = nullptr;
  std::uint64_t timeout_ns = 0;
};

/// Bytes of a rank's flags for up to that many CTAs.
std::size_t peer_flags(int ctas);

}  // namespace flash_mla::sm90
