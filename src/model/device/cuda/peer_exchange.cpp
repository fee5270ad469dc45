// Sums and gathers by kernels over the memory of all ranks (kernels/exchange).

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "base/cuda/check.h"
#include "flash_mla/error.h"
#include "kernels/exchange/sm90/all_reduce_norm.h"
#include "kernels/exchange/sm90/gather_columns.h"
#include "model/device/cuda/copy_queue.h"
#include "model/device/cuda/exchanged.h"
#include "model/device/cuda/rank_exchange.h"

namespace flash_mla::model {
namespace {

// CTAs of a rank's kernel on a GPU of its own, and of all ranks' together on one that they share: there they wait while
// the others' kernels must find room, of which some need half the multiprocessors of a cluster's part of the GPU at once (64
// CTAs of each of two ranks left none for the choice of an indexer).
constexpr int kMostCtas = 64, kSharedCtas = 8;

class PeerExchange : public RankExchange {
 public:
  PeerExchange(comm::Communicator& ranks, cudaStream_t stream) : ranks_(ranks), stream_(stream) {
    if (ranks.size() > sm90::kMaxPeers) {
      throw Unsupported(
          fmt::format("tp is {}: device cuda takes at most {} ranks", ranks.size(), sm90::kMaxPeers));
    }
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    const std::vector<int> devices = exchanged(ranks, device);
    for (const int peer : devices) reach(device, peer);
    std::int64_t sharing = 1;
    for (const int peer : devices)
      sharing = std::max(sharing, std::int64_t{std::ranges::count(devices, peer)});
    most_ctas_ = sharing == 1 ? kMostCtas : std::max(static_cast<int>(kSharedCtas / sharing), 1);

    const std::size_t bytes = sm90::peer_flags(most_ctas_);
    void* flags = nullptr;
    check_cuda(cudaMalloc(&flags, bytes), "cudaMalloc");
    flags_ = std::shared_ptr<void>(flags, [](void* p) { cudaFree(p); });
    check_cuda(cudaMemsetAsync(flags, 0, bytes, stream_), "cudaMemsetAsync");
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    if (ranks.rank() == 0) {
      failed_ = allocate_pinned(sizeof(std::uint32_t));
      std::memset(failed_.data(), 0, sizeof(std::uint32_t));
    }
    struct Open {
      void *flags, *failed;
    };
    const std::vector<Open> open = exchanged(ranks, Open{flags, failed_.data()});
    peers_.rank = ranks.rank();
    peers_.size = ranks.size();
    for (std::size_t r = 0; r < open.size(); ++r)
      peers_.flags[r] = static_cast<std::uint32_t*>(open[r].flags);
    peers_.failed = static_cast<std::uint32_t*>(open[0].failed);
    peers_.timeout_ns = static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(comm::kTimeout).count());
  }

  void add_sum(const Matrix& partial, const Matrix& x, const Norm& norm) override {
    struct Open {
      void *partial, *x, *normed;
    };
    const std::vector<Open> open = exchanged(ranks_, Open{partial.data, x.data, norm.out.data});
    sm90::AllReduceNorm args;
    args.peers = peers_;
    args.rows = x.rows;
    args.hidden = x.columns;
    for (std::size_t r = 0; r < open.size(); ++r) {
      args.partial[r] = open[r].partial;
      args.x[r] = open[r].x;
      args.normed[r] = open[r].normed;
    }
    args.weight = norm.weight;
    args.eps = norm.eps;
    args.ctas = ctas((x.rows + peers_.size - 1) / peers_.size);
    sm90::all_reduce_norm(args, stream_);
    sum_on_host(0);
  }

  void gather_columns(const Matrix& whole, std::span<const Range> parts) override {
    const std::vector<void*> open = exchanged(ranks_, static_cast<void*>(whole.data));
    const auto element = static_cast<std::int64_t>(dtype_size(whole.dtype));
    const Range own = parts[static_cast<std::size_t>(peers_.rank)];
    sm90::GatherColumns args;
    args.peers = peers_;
    std::ranges::copy(open, args.whole);
    args.rows = whole.rows;
    args.pitch = whole.stride * element;
    args.first = own.first * element;
    args.count = own.count * element;
    // The same kernel on all ranks: loading one while another waits could take for ever.
    args.by_16 = args.pitch % 16 == 0 && std::ranges::all_of(parts, [element](const Range& part) {
                   return part.first * element % 16 == 0 && part.count * element % 16 == 0;
                 });
    args.ctas = ctas(whole.rows);
    sm90::gather_columns(args, stream_);
    sum_on_host(0);
  }

  bool sums_in_order() const override { return true; }

  // Behind every launch as well: until all kernels that wait for each other are queued, no rank may do anything that waits
  // for the GPU, as loading a kernel and allocating memory can.
  std::uint64_t sum_on_host(std::uint64_t value) override {
    std::uint64_t sum = 0;
    for (const std::uint64_t of_rank : exchanged(ranks_, value)) sum += of_rank;
    return sum;
  }

  void fail() noexcept override { failed().store(1); }
  void check() const override {
    if (failed().load() != 0)
      throw comm::RankError(ranks_.number(), "a rank of its group has not come to an exchange");
  }

 private:
  static void check_cuda(cudaError_t error, const char* what) { flash_mla::check(error, what); }

  static void reach(int device, int peer) {
    if (peer == device) return;
    int can = 0;
    check_cuda(cudaDeviceCanAccessPeer(&can, device, peer), "cudaDeviceCanAccessPeer");
    if (can == 0)
      throw Unsupported(fmt::format("device cuda: GPU {} cannot reach the memory of GPU {}", device, peer));
    const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();
      return;
    }
    check_cuda(error, "cudaDeviceEnablePeerAccess");
  }

  int ctas(std::int64_t rows) const {
    return static_cast<int>(std::clamp<std::int64_t>(rows, 1, most_ctas_));
  }
  std::atomic_ref<std::uint32_t> failed() const { return std::atomic_ref(*peers_.failed); }

  comm::Communicator& ranks_;
  const cudaStream_t stream_;
  std::shared_ptr<void> flags_;
  Buffer failed_;  ///< rank 0's is that of all
  sm90::Peers peers_;
  int most_ctas_ = 1;
};

}  // namespace

std::unique_ptr<RankExchange> make_peer_exchange(comm::Communicator& ranks, cudaStream_t stream) {
  return std::make_unique<PeerExchange>(ranks, stream);
}

}  // namespace flash_mla::model
