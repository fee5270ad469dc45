#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>

#include "base/matrix.h"
#include "comm/communicator.h"
#include "model/device/cuda/memory.h"
#include "model/parallel/partition.h"

namespace flash_mla::model {

/// What ranks on GPUs, which are threads of one process, do together: calls are queued on the rank's stream, all ranks make
/// the same ones, and may record them in a CUDA graph. A call returns when all ranks have queued theirs. Calls throw
/// comm::RankError where a rank has failed or does not come.
class RankExchange {
 public:
  virtual ~RankExchange() = default;

  /// rms_norm(x) * weight, to `out`; of no weight, nothing.
  struct Norm {
    const float* weight = nullptr;  ///< (hidden)
    float eps = 0;
    Matrix out{};
  };
  /// x += the sum of all ranks' `partial`, and its norm: (rows, hidden) bfloat16, dense. On all ranks the same bits.
  virtual void add_sum(const Matrix& partial, const Matrix& x, const Norm& norm) = 0;
  /// `whole` has columns parts[rank]; afterwards it has those of all ranks. float32.
  virtual void gather_columns(const Matrix& whole, std::span<const Range> parts) = 0;

  /// Whether sums are taken in the order of the ranks, whatever the number of rows.
  virtual bool sums_in_order() const = 0;

  /// On the host: the sum of what all ranks say; returns when all have come.
  virtual std::uint64_t sum_on_host(std::uint64_t value) = 0;
  /// Kernels of this group wait for nobody any more.
  virtual void fail() noexcept = 0;
  /// Throws RankError if a kernel has waited in vain.
  virtual void check() const = 0;
};

/// Of a rank of a group whose host side is `ranks`, on the current device, whose layers take their memory of `pool`. All ranks
/// make theirs together. Throws Unsupported.
///
/// By kernels over each other's memory, which the GPUs must reach, one and the same GPU included.
std::unique_ptr<RankExchange> make_peer_exchange(comm::Communicator& ranks, cudaStream_t stream);
/// By NCCL, of a GPU for each rank. The bits of a sum are its affair, and may depend on the rows.
std::unique_ptr<RankExchange> make_nccl_exchange(comm::Communicator& ranks, DevicePool& pool,
                                                 cudaStream_t stream);
/// The first of these two that all ranks can take.
std::unique_ptr<RankExchange> make_rank_exchange(comm::Communicator& ranks, DevicePool& pool,
                                                 cudaStream_t stream);

}  // namespace flash_mla::model
