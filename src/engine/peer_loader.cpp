#include "engine/peer_loader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "flash_mla/error.h"

namespace flash_mla {

const char* transfer_role_name(TransferRole role) {
  switch (role) {
    case TransferRole::kPrefill:
      return "prefill";
    case TransferRole::kDecode:
      return "decode";
    default:
      return "none";
  }
}

void check_transfer(const TransferOptions& o) {
  if (o.role == TransferRole::kNone) return;
  if (o.transport != "shm" && o.transport != "nixl")
    throw InvalidArgument(fmt::format("transfer.transport is \"{}\", expected shm or nixl", o.transport));
  if (o.port < 0 || o.port > 65535)
    throw InvalidArgument(fmt::format("transfer.port is {}, expected 0 to 65535", o.port));
  if (!(o.lease_seconds > 0) || !std::isfinite(o.lease_seconds))
    throw InvalidArgument(fmt::format("transfer.lease_seconds is {}, expected more than 0", o.lease_seconds));
  if (o.layerwise_tokens < 0)
    throw InvalidArgument(
        fmt::format("transfer.layerwise_tokens is {}, expected 0 or more", o.layerwise_tokens));
  if (o.role == TransferRole::kPrefill && !o.peers.empty())
    throw InvalidArgument("transfer.peers: expected none of a prefill server; decode servers come to it");
  if (o.role == TransferRole::kPrefill) return;
  if (o.peers.empty())
    throw InvalidArgument("transfer.peers is empty, expected HOST:PORT of the prefill servers, or *");
  for (const std::string& peer : o.peers) {
    const std::size_t colon = peer.rfind(':');
    const bool has_port = colon != std::string::npos && colon > 0 && colon + 1 < peer.size() &&
                          std::all_of(peer.begin() + static_cast<std::ptrdiff_t>(colon) + 1, peer.end(),
                                      [](char c) { return c >= '0' && c <= '9'; });
    if (peer != "*" && !has_port)
      throw InvalidArgument(fmt::format("transfer.peers has \"{}\", expected HOST:PORT or *", peer));
  }
}

}  // namespace flash_mla
