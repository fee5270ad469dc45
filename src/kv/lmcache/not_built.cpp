#include <stdexcept>

#include "kv/kv_tier.h"

// What stands for the client of LMCache's server where it is not built.

namespace flash_mla::kv {

std::string why_no_lmcache() {
  return "this build has no client of LMCache's server; build with FLASH_MLA_LMCACHE=ON (libgrpc++-dev, "
         "libprotobuf-dev, protobuf-compiler-grpc)";
}

std::unique_ptr<KvTier> make_lmcache_tier(const std::string& /*address*/, const TierConfig& /*config*/) {
  throw std::logic_error(why_no_lmcache());
}

}  // namespace flash_mla::kv
