// Sums and gathers by NCCL: for GPUs that do not reach each other's memory, one for each rank.

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "base/cuda/check.h"
#include "flash_mla/error.h"
#include "kernels/exchange/sm90/all_reduce_norm.h"
#include "model/device/cuda/exchanged.h"
#include "model/device/cuda/nccl_library.h"
#include "model/device/cuda/rank_exchange.h"

namespace flash_mla::model {
namespace {

constexpr int kCtas = 128;

class NcclExchange : public RankExchange {
 public:
  NcclExchange(comm::Communicator& ranks, DevicePool& pool, cudaStream_t stream)
      : nccl_(open_nccl()), ranks_(ranks), pool_(pool), stream_(stream) {
    NcclId id{};
    if (ranks.rank() == 0) check_nccl(nccl_.get_unique_id(&id), "ncclGetUniqueId");
    // Nobody waits in NCCL for a rank that has not come so far.
    id = exchanged(ranks, id).front();
    check_nccl(nccl_.init_rank(&group_, ranks.size(), id, ranks.rank()), "ncclCommInitRank");
    const std::size_t bytes = sm90::peer_flags(kCtas);
    flags_ = pool.allocate(bytes);
    check_cuda(cudaMemsetAsync(flags_.data(), 0, bytes, stream_), "cudaMemsetAsync");
  }
  ~NcclExchange() override {
    if (group_ != nullptr) nccl_.destroy(group_);
  }

  // A rank's own kernel adds the sum to x and takes the norm.
  void add_sum(const Matrix& partial, const Matrix& x, const Norm& norm) override {
    check();
    const auto count = static_cast<std::size_t>(partial.rows * partial.columns);
    check_nccl(nccl_.all_reduce(partial.data, partial.data, count, kNcclBfloat16, kNcclSum, group_, stream_),
               "ncclAllReduce");
    sm90::AllReduceNorm args;
    args.peers.flags[0] = reinterpret_cast<std::uint32_t*>(flags_.data());
    args.rows = x.rows;
    args.hidden = x.columns;
    args.partial[0] = partial.data;
    args.x[0] = x.data;
    args.normed[0] = norm.out.data;
    args.weight = norm.weight;
    args.eps = norm.eps;
    args.ctas = static_cast<int>(std::clamp<std::int64_t>(x.rows, 1, kCtas));
    sm90::all_reduce_norm(args, stream_);
    sum_on_host(0);
  }

  // Ranks send as many columns as the one with the most.
  void gather_columns(const Matrix& whole, std::span<const Range> parts) override {
    check();
    const auto element = static_cast<std::int64_t>(dtype_size(whole.dtype));
    const std::int64_t most = std::ranges::max_element(parts, {}, &Range::count)->count;
    const auto bytes = static_cast<std::size_t>(whole.rows * most * element);
    const std::size_t ranks = parts.size();
    if (staging_.bytes() < (ranks + 1) * bytes) {
      staging_ = {};
      staging_ = pool_.allocate((ranks + 1) * bytes);
    }
    std::byte* const received = staging_.data() + bytes;
    const Matrix sent{staging_.data(), whole.dtype, whole.rows, most, most};
    const Range own = parts[static_cast<std::size_t>(ranks_.rank())];
    copy(whole.column_range(own.first, own.count), sent.column_range(0, own.count));
    check_nccl(nccl_.all_gather(sent.data, received, bytes, kNcclInt8, group_, stream_), "ncclAllGather");
    for (std::size_t r = 0; r < ranks; ++r) {
      const Matrix of_rank{received + r * bytes, whole.dtype, whole.rows, most, most};
      copy(of_rank.column_range(0, parts[r].count), whole.column_range(parts[r].first, parts[r].count));
    }
    sum_on_host(0);
  }

  bool sums_in_order() const override { return false; }

  std::uint64_t sum_on_host(std::uint64_t value) override {
    std::uint64_t sum = 0;
    for (const std::uint64_t of_rank : exchanged(ranks_, value)) sum += of_rank;
    return sum;
  }
  void fail() noexcept override {
    failed_ = true;
    if (NcclGroup const group = std::exchange(group_, nullptr)) nccl_.abort(group);
  }
  void check() const override {
    if (failed_) throw comm::RankError(ranks_.number(), "its group of NCCL has been given up");
  }

 private:
  static void check_cuda(cudaError_t error, const char* what) { flash_mla::check(error, what); }
  void check_nccl(int error, const char* what) const {
    if (error != 0) throw std::runtime_error(fmt::format("{}: {}", what, nccl_.get_error_string(error)));
  }
  void copy(const Matrix& from, const Matrix& to) const {
    const auto bytes = [](std::int64_t elements, const Matrix& m) {
      return static_cast<std::size_t>(elements) * dtype_size(m.dtype);
    };
    check_cuda(cudaMemcpy2DAsync(to.data, bytes(to.stride, to), from.data, bytes(from.stride, from),
                                 bytes(from.columns, from), static_cast<std::size_t>(from.rows),
                                 cudaMemcpyDeviceToDevice, stream_),
               "cudaMemcpy2DAsync");
  }

  const NcclLibrary& nccl_;
  comm::Communicator& ranks_;
  DevicePool& pool_;
  const cudaStream_t stream_;
  NcclGroup group_ = nullptr;
  Buffer flags_, staging_;
  std::atomic<bool> failed_ = false;
};

}  // namespace

std::unique_ptr<RankExchange> make_nccl_exchange(comm::Communicator& ranks, DevicePool& pool,
                                                 cudaStream_t stream) {
  return std::make_unique<NcclExchange>(ranks, pool, stream);
}

}  // namespace flash_mla::model
