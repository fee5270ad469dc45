#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace flash_mla {

/// What an engine does of a request that comes with a bootstrap room.
enum class TransferRole {
  kNone,  ///< it is refused
  kPrefill,  ///< computes the prompt, sends its pages to the decode server that asks for them, and one token to the caller
  kDecode,  ///< begins with the pages that a prefill server sends
};
/// "none", "prefill", "decode".
const char* transfer_role_name(TransferRole role);

/// Prefill and decode as two engines (docs/serving.md).
struct TransferOptions {
  TransferRole role = TransferRole::kNone;
  /// "shm": shared memory, between processes of one machine and user. "nixl": NIXL's C library, which has to be there.
  std::string transport = "shm";
  /// Prefill: the address that decode servers connect to; port 0 is any free one.
  std::string host = "127.0.0.1";
  int port = 8998;
  /// Decode: "HOST:PORT" of the prefill servers that it may ask, as requests name them; "*": any.
  std::vector<std::string> peers;
  std::string key;  ///< that both sides must have; empty: none
  /// How long either side waits for the other; what is not there then is computed by the decode side, or refused by the
  /// prefill side.
  double lease_seconds = 60;
  /// Decode: of host memory for what is on its way, at most.
  std::size_t memory_bytes = std::size_t{1} << 30;
  /// Prompts of so many tokens and more are sent while they are computed, layer by layer where the device computes in
  /// the call (the CPU), else step by step; shorter ones as a whole.
  std::int64_t layerwise_tokens = 8192;
};

/// Throws InvalidArgument for options out of range: worth knowing before a model is loaded.
void check_transfer(const TransferOptions& options);

/// What a router says of the two servers that it gives a request to: SGLang's bootstrap_host, bootstrap_port and
/// bootstrap_room.
struct BootstrapRoom {
  std::string host;  ///< of the prefill server; only the decode server reads it
  int port = 8998;
  std::int64_t room = -1;  ///< >= 0; of no other request at the time
};

/// What transfers have done (TransferOptions).
struct TransferStats {
  TransferRole role = TransferRole::kNone;
  int port = 0;                  ///< prefill: where decode servers connect to
  std::int64_t rooms = 0;        ///< requests that came with one
  std::int64_t handed_over = 0;  ///< of which all pages have been sent, or have come and been loaded
  std::int64_t bytes = 0;        ///< sent or received
  double seconds = 0;  ///< prefill: in writes. Decode: from asking to the arrival, summed over rooms
  double overlapped_seconds = 0;  ///< prefill: of these, while the prompt was still being computed
  int open = 0;                   ///< rooms now
  /// Decode: prompts that it computed itself, by why. Prefill: requests refused, and rooms that the decode side left.
  std::vector<std::pair<std::string, std::int64_t>> fallbacks;
  std::string last_trouble;  ///< the latest such reason in words
};

}  // namespace flash_mla
