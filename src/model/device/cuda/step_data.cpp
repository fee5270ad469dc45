#include "model/device/cuda/step_data.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <span>

#include "base/cuda/check.h"

namespace flash_mla::model {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr std::int64_t kFewestBlocks = 16;

}  // namespace

/// Places arrays one behind the other: first to learn the size (host == nullptr), then to write.
class StepUploader::Packer {
 public:
  Packer(std::byte* host, std::byte* device) : host_(host), device_(device) {}

  /// Room for `count` values; `write(to)` fills it.
  template <class T, class F>
  T* place(std::size_t count, const F& write) {
    const std::size_t offset = bytes_;
    bytes_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    if (host_ == nullptr) return nullptr;
    write(reinterpret_cast<T*>(host_ + offset));
    return reinterpret_cast<T*>(device_ + offset);
  }
  template <class T>
  T* place(const std::vector<T>& values) {
    return place<T>(values.size(), [&](T* to) { std::copy(values.begin(), values.end(), to); });
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* host_;
  std::byte* device_;
  std::size_t bytes_ = 0;
};

StepUploader::StepUploader() {
  check(cudaEventCreateWithFlags(&sent_, cudaEventDisableTiming), "cudaEventCreate");
}
StepUploader::~StepUploader() { cudaEventDestroy(sent_); }

StepData StepUploader::upload(const Step& step, std::int64_t most_keys, DevicePool& pool,
                              cudaStream_t stream) {
  struct GroupArrays {
    std::vector<std::int32_t> query_starts{0}, key_starts{0}, tables, pages;
  };
  std::vector<GroupArrays> arrays;
  StepData data;
  data.max_blocks = static_cast<std::int64_t>(
      std::bit_ceil(static_cast<std::uint64_t>(std::max(step.max_blocks, kFewestBlocks))));
  for (const Chunk& chunk : step.chunks) {
    if (data.groups.empty() || data.groups.back().num_keys + chunk.seq_len > most_keys) {
      data.groups.emplace_back().first_query = chunk.first_token - step.num_absorbed;
      arrays.emplace_back();
    }
    StepData::Group& group = data.groups.back();
    GroupArrays& a = arrays.back();
    ++group.num_seqs;
    group.num_queries += chunk.num_tokens;
    group.num_keys += chunk.seq_len;
    a.query_starts.push_back(static_cast<std::int32_t>(group.num_queries));
    a.key_starts.push_back(static_cast<std::int32_t>(group.num_keys));
    a.tables.push_back(static_cast<std::int32_t>(a.pages.size()));
    a.pages.insert(a.pages.end(), chunk.pages.begin(), chunk.pages.end());
  }

  const auto pack = [&](Packer& packer) {
    data.token_ids = packer.place(step.token_ids);
    data.positions = packer.place(step.positions);
    data.slots = packer.place(step.slots);
    data.logit_rows = packer.place(step.logit_rows);
    data.draws = packer.place(step.draws);
    data.lens = packer.place(step.absorbed_lens);
    data.table = packer.place<std::int32_t>(
        static_cast<std::size_t>(step.num_absorbed * data.max_blocks), [&](auto* to) {
          const auto* from = step.absorbed_table.data();
          for (std::int64_t i = 0; i < step.num_absorbed; ++i) {
            std::copy_n(from + i * step.max_blocks, step.max_blocks, to + i * data.max_blocks);
          }
        });
    for (std::size_t i = 0; i < arrays.size(); ++i) {
      data.groups[i].query_starts = packer.place(arrays[i].query_starts);
      data.groups[i].key_starts = packer.place(arrays[i].key_starts);
      data.groups[i].tables = packer.place(arrays[i].tables);
      data.groups[i].pages = packer.place(arrays[i].pages);
    }
  };
  Packer measure(nullptr, nullptr);
  pack(measure);
  const std::size_t bytes = measure.bytes();
  check(cudaEventSynchronize(sent_), "cudaEventSynchronize");
  // Twice what is needed, since a batch that has grown grows on.
  if (bytes > host_.bytes()) host_.grow(2 * bytes);
  if (bytes > device_.bytes()) device_ = pool.allocate(2 * bytes);
  Packer write(host_.data(), device_.data());
  pack(write);
  check(cudaMemcpyAsync(device_.data(), host_.data(), bytes, cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
  check(cudaEventRecord(sent_, stream), "cudaEventRecord");
  return data;
}

}  // namespace flash_mla::model
