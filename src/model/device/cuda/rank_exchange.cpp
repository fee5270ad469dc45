#include "model/device/cuda/rank_exchange.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "base/cuda/check.h"
#include "flash_mla/error.h"
#include "model/device/cuda/exchanged.h"
#include "model/device/cuda/nccl_library.h"

namespace flash_mla::model {

std::unique_ptr<RankExchange> make_rank_exchange(comm::Communicator& ranks, DevicePool& pool,
                                                 cudaStream_t stream) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::vector<int> devices = exchanged(ranks, device);
  int out_of_reach = -1;
  for (const int peer : devices) {
    int reaches = 1;
    if (peer != device) check(cudaDeviceCanAccessPeer(&reaches, device, peer), "cudaDeviceCanAccessPeer");
    if (reaches == 0) out_of_reach = peer;
  }
  // One way for all.
  const std::vector<int> missed = exchanged(ranks, out_of_reach);
  if (std::ranges::count(missed, -1) == std::ssize(missed)) return make_peer_exchange(ranks, stream);
  if (const std::string why = why_no_nccl(); !why.empty()) {
    const auto rank = std::ranges::find_if(missed, [](int peer) { return peer >= 0; }) - missed.begin();
    throw Unsupported(fmt::format("device cuda: GPU {} does not reach the memory of GPU {}, and {}",
                                  devices[static_cast<std::size_t>(rank)],
                                  missed[static_cast<std::size_t>(rank)], why));
  }
  return make_nccl_exchange(ranks, pool, stream);
}

}  // namespace flash_mla::model
