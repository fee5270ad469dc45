// Host side of the Hopper backend: what it accepts, tensor maps, how the work is shaped.

#include "sm90/dense_decode.h"

#include <cuda.h>
#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numbers>

#include "flash_mla/error.h"
#include "sm90/decode/launch.h"

namespace flash_mla::sm90 {
namespace {

constexpr std::size_t kAlignment = 256;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(fmt::format("{}: {}", what, cudaGetErrorString(error)));
}

struct DeviceInfo {
  bool known = false;
  int major = 0, minor = 0, sms = 0;
  std::string name;
};

const DeviceInfo& device_info(int index) {
  static std::mutex mutex;
  static std::array<DeviceInfo, 64> devices;
  if (index < 0 || index >= static_cast<int>(devices.size())) {
    throw InvalidArgument(
        fmt::format("CUDA device index is {}, expected 0 to {}", index, devices.size() - 1));
  }
  const std::lock_guard lock(mutex);
  DeviceInfo& d = devices[static_cast<std::size_t>(index)];
  if (!d.known) {
    cudaDeviceProp prop{};
    check(cudaGetDeviceProperties(&prop, index), "cudaGetDeviceProperties");
    d = {true, prop.major, prop.minor, prop.multiProcessorCount, prop.name};
  }
  return d;
}

/// Makes a device current for the life of the object.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (index != before_) check(cudaSetDevice(index), "cudaSetDevice");
    changed_ = index != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled kFunction = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
    if (result != cudaDriverEntryPointSuccess)
      throw Unsupported("the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(f);
  }();
  return kFunction;
}

/// One dimension of a tensor map: its size, the bytes from one index to the next (none for the innermost),
/// and how much of it a box covers.
struct MapDim {
  std::int64_t size;
  std::int64_t stride_bytes;
  int box;
};

/// A tensor map, innermost dimension (64 contiguous columns) first, with 128-byte swizzle.
template <std::size_t kRank>
CUtensorMap tensor_map(const char* name, const TensorView& t, const std::array<MapDim, kRank>& dims) {
  CUtensorMap map;
  std::array<cuuint64_t, kRank> shape{};
  std::array<cuuint64_t, kRank - 1> strides{};
  std::array<cuuint32_t, kRank> box{}, steps{};
  for (std::size_t i = 0; i < kRank; ++i) {
    shape[i] = static_cast<cuuint64_t>(dims[i].size);
    box[i] = static_cast<cuuint32_t>(dims[i].box);
    steps[i] = 1;
    // A dimension of one element may carry any stride; the map wants a sound one.
    if (i > 0)
      strides[i - 1] = static_cast<cuuint64_t>(dims[i].size > 1 ? dims[i].stride_bytes : kHeadDim * 2);
  }
  const CUresult r = encode_tiled()(
      &map, t.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      kRank, t.data, shape.data(), strides.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) {
    throw InvalidArgument(fmt::format("{} is {} with a layout that no tensor map can describe (CUresult {})",
                                      name, t.describe(), static_cast<int>(r)));
  }
  return map;
}

/// (columns of a chunk, tokens, chunks, latent heads, pages)
CUtensorMap key_map(const TensorView& k, int box_tokens, int box_chunks) {
  return tensor_map<5>("k_cache", k,
                       {{{64, 0, 64},
                         {k.size(1), k.stride(1) * 2, box_tokens},
                         {kHeadDim / 64, 128, box_chunks},
                         {k.size(2), k.stride(2) * 2, 1},
                         {k.size(0), k.stride(0) * 2, 1}}});
}

RowBlocks blocks_of(const DenseDecodeArgs& a) {
  return row_blocks(static_cast<int>(a.q.size(1)), static_cast<int>(a.q.size(2) / a.k_cache.size(2)));
}
/// The heuristics table: which division of work suits the shape.
Division division_of(const DecodeParams& p) {
  if (const char* forced = std::getenv("FLASH_MLA_SM90_DIVISION")) {
    return forced[0] == 'p' ? Division::kPaired : Division::kSharedTile;
  }
  // One row block per latent head is memory-bound; two or more are compute-bound once there is enough to do.
  return p.blocks.count() >= 2 ? Division::kPaired : Division::kSharedTile;
}
int cluster_of(const RowBlocks& blocks) { return blocks.count() % 2 == 0 ? 2 : 1; }

std::size_t align_up(std::size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

std::size_t partial_rows(const DenseDecodeArgs& a, const DecodeScheduleView& s) {
  return static_cast<std::size_t>(2 * s.parts.size(0) * a.q.size(1) * a.q.size(2));
}

void require_stride(const TensorView& t, const char* name) {
  for (int i = 0; i + 1 < t.rank; ++i) {
    if (t.size(i) > 1 && (t.stride(i) % 8 != 0 || t.stride(i) == 0)) {
      throw InvalidArgument(
          fmt::format("{}.stride[{}] is {}, expected a positive multiple of 8 elements (16 bytes)", name, i,
                      t.stride(i)));
    }
  }
  if (reinterpret_cast<std::uintptr_t>(t.data) % 16 != 0) {
    throw InvalidArgument(fmt::format("{}.data is {}, expected a pointer aligned to 16 bytes", name, t.data));
  }
}

}  // namespace

std::string device_name(int index) { return device_info(index).name; }

std::string reject_reason(int index) {
  const DeviceInfo& d = device_info(index);
  if (d.major == 9 && d.minor == 0) return "";
  return fmt::format(
      "the sm90 decode kernels need compute capability 9.0 (H100, H200, H800, H20); {} has {}.{}: use "
      "CPU tensors",
      d.name, d.major, d.minor);
}

int num_parts(const DenseDecodeArgs& a) {
  const RowBlocks blocks = blocks_of(a);
  const int sms = device_info(a.q.device.index).sms;
  return std::max(sms / static_cast<int>(a.k_cache.size(2)) / blocks.count(), 1);
}

void check_supported(const DenseDecodeArgs& a, const DecodeScheduleView& s) {
  const std::string reason = reject_reason(a.q.device.index);
  if (!reason.empty()) throw Unsupported(reason);
  if (a.q.dtype == DType::kFloat32)
    throw Unsupported("q is float32; the sm90 backend takes bfloat16 and float16");
  if (a.q.size(3) != kHeadDim || a.out.size(3) != kHeadDimV) {
    throw Unsupported(fmt::format("head dimensions are {} / {}; the sm90 backend takes 576 / 512",
                                  a.q.size(3), a.out.size(3)));
  }
  const std::int64_t page = a.k_cache.size(1);
  if (page != 16 && page != 32 && page % kTileTokens != 0) {
    throw Unsupported(
        fmt::format("page_size is {}; the sm90 backend takes 16, 32 and multiples of 64", page));
  }
  if (a.q.size(0) > 65535)
    throw Unsupported(fmt::format("b is {}; the sm90 backend takes up to 65535", a.q.size(0)));
  if (s.block_size != kTileTokens) {
    throw Unsupported(
        fmt::format("schedule.block_size is {}; the sm90 backend takes {}", s.block_size, kTileTokens));
  }
  if (s.fixed_split_blocks != 0) throw Unsupported("the sm90 backend has no batch-invariant mode yet");
  if (s.unit != PartUnit::kBlocks) throw Unsupported("the sm90 backend takes schedules in blocks");
  require_stride(a.q, "q");
  require_stride(a.k_cache, "k_cache");
  require_stride(a.out, "out");
}

std::size_t dense_decode_workspace_size(const DenseDecodeArgs& a, const DecodeScheduleView& s) {
  if (s.parts.size(0) == 1) return 0;
  return align_up(partial_rows(a, s) * kHeadDimV * sizeof(float)) +
         align_up(partial_rows(a, s) * sizeof(float));
}

void dense_decode(const DenseDecodeArgs& a, const DecodeScheduleView& s, void* workspace, float softmax_scale,
                  bool causal, void* stream) {
  const DeviceGuard guard(a.q.device.index);
  DecodeParams p{};
  p.blocks = blocks_of(a);
  p.batch = static_cast<int>(a.q.size(0));
  p.s_q = static_cast<int>(a.q.size(1));
  p.h_q = static_cast<int>(a.q.size(2));
  const int h_kv = static_cast<int>(a.k_cache.size(2));
  p.group = p.h_q / h_kv;
  p.page_size = static_cast<int>(a.k_cache.size(1));
  p.num_parts = static_cast<int>(s.parts.size(0));
  p.causal = causal;
  p.scale_log2 = softmax_scale * std::numbers::log2e_v<float>;
  p.block_table = a.block_table.ptr<const std::int32_t>();
  p.block_table_stride = a.block_table.stride(0);
  p.cache_seqlens = a.cache_seqlens.ptr<const std::int32_t>();
  p.parts = s.parts.ptr<const std::int32_t>();
  p.num_splits = s.num_splits.ptr<const std::int32_t>();
  p.out = a.out.data;
  p.out_stride_b = a.out.stride(0);
  p.out_stride_s = a.out.stride(1);
  p.out_stride_h = a.out.stride(2);
  if (a.lse.defined()) {
    p.lse = a.lse.ptr<float>();
    p.lse_stride_b = a.lse.stride(0);
    p.lse_stride_h = a.lse.stride(1);
    p.lse_stride_s = a.lse.stride(2);
  }
  p.partial_out = static_cast<float*>(workspace);
  p.partial_lse = reinterpret_cast<float*>(static_cast<std::byte*>(workspace) +
                                           align_up(partial_rows(a, s) * kHeadDimV * sizeof(float)));
  const int cluster = cluster_of(p.blocks);
  const CUtensorMap q_map = tensor_map<4>("q", a.q,
                                          {{{kHeadDim, 0, 64},
                                            {a.q.size(2), a.q.stride(2) * 2, p.blocks.heads},
                                            {a.q.size(1), a.q.stride(1) * 2, p.blocks.tokens},
                                            {a.q.size(0), a.q.stride(0) * 2, 1}}});
  const int piece = std::min(p.page_size, kTileTokens);
  const CUtensorMap k_piece_map = key_map(a.k_cache, piece, 1);
  const CUtensorMap k_map =
      p.page_size < kTileTokens ? k_piece_map : key_map(a.k_cache, kTileTokens, 4 / cluster);
  const bool bf16 = a.q.dtype == DType::kBFloat16;
  launch_dense_decode(p, q_map, k_map, k_piece_map, bf16, cluster, division_of(p), h_kv, stream);
}

void build_schedule(const TensorView& cache_seqlens, const ScheduleOptions& options,
                    const DecodeScheduleView& s, void* stream) {
  const DeviceGuard guard(cache_seqlens.device.index);
  ScheduleParams p{};
  p.cache_seqlens = cache_seqlens.ptr<const std::int32_t>();
  p.batch = static_cast<int>(cache_seqlens.size(0));
  p.num_parts = options.num_parts;
  p.block_size = options.block_size;
  p.fixed_overhead_blocks = options.fixed_overhead_blocks;
  p.min_blocks_per_request = options.min_blocks_per_request;
  p.parts = s.parts.ptr<std::int32_t>();
  p.num_splits = s.num_splits.ptr<std::int32_t>();
  if (p.batch > kMaxScheduleBatch) {
    throw Unsupported(fmt::format("b is {}; the device schedule takes up to {}", p.batch, kMaxScheduleBatch));
  }
  launch_schedule(p, stream);
}

}  // namespace flash_mla::sm90
