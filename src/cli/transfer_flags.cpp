#include "cli/transfer_flags.h"

#include <map>
#include <string>

#include "cli/args.h"

namespace flash_mla::cli {

void add_transfer_flags(CLI::App& app, TransferOptions& o) {
  static const std::map<std::string, TransferRole> roles = {
      {"none", TransferRole::kNone}, {"prefill", TransferRole::kPrefill}, {"decode", TransferRole::kDecode}};
  app.add_option_function<std::string>(
         "--role", [&o](const std::string& name) { o.role = roles.at(name); },
         "Of requests with a bootstrap_room: prefill computes prompts and sends their pages, decode goes on with them")
      ->default_str("none")
      ->check(CLI::IsMember(roles));
  app.add_option(
         "--peer", o.peers,
         "Decode: HOST:PORT of a prefill server's bootstrap port, as requests name it, or * for any; may be "
         "given several times")
      ->allow_extra_args(false);
  app.add_option("--peer-key", o.key, "Key that prefill and decode servers must share")
      ->envname("FLASH_MLA_PEER_KEY");
  app.add_option("--bootstrap-host", o.host, "Prefill: address for decode servers")->capture_default_str();
  app.add_option("--bootstrap-port", o.port, "Prefill: port for decode servers; 0 takes any free one")
      ->check(integer_between(0, 65535))
      ->capture_default_str();
  app.add_option("--transport", o.transport,
                 "Of pages: shm (processes of one machine and user) or nixl (NIXL's C library)")
      ->check(CLI::IsMember({"shm", "nixl"}))
      ->capture_default_str();
  app.add_option("--lease", o.lease_seconds,
                 "Seconds that either side waits for the other; then the decode side computes by itself")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--transfer-memory", o.memory_bytes, "Decode: host memory for pages on their way, e.g. 4GiB")
      ->transform(CLI::AsSizeValue(false))
      ->default_str("1GiB");
  app.add_option(
         "--layerwise-tokens", o.layerwise_tokens,
         "Prefill: prompts of so many tokens are sent while they are computed, shorter ones as a whole")
      ->capture_default_str();
}

}  // namespace flash_mla::cli
