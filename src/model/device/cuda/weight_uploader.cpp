#include "model/device/cuda/weight_uploader.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/cuda/check.h"
#include "base/parallel.h"

namespace flash_mla::model {
namespace {

constexpr std::size_t kStagingBytes = std::size_t{32} << 20;

// One core copies far slower than the bus.
void copy(const std::byte* from, std::size_t bytes, std::byte* to) {
  constexpr std::size_t kPiece = std::size_t{1} << 20;
  const auto pieces = static_cast<std::int64_t>((bytes + kPiece - 1) / kPiece);
  parallel_for(pieces, pieces >= 4 ? default_threads() : 1, [&](std::int64_t i) {
    const std::size_t begin = static_cast<std::size_t>(i) * kPiece;
    std::memcpy(to + begin, from + begin, std::min(kPiece, bytes - begin));
  });
}

}  // namespace

WeightUploader::WeightUploader(cudaStream_t stream) : stream_(stream) {
  for (Half& half : halves_) {
    half.host.grow(kStagingBytes);
    check(cudaEventCreateWithFlags(&half.sent, cudaEventDisableTiming), "cudaEventCreate");
  }
}

WeightUploader::~WeightUploader() {
  for (Half& half : halves_) {
    cudaEventSynchronize(half.sent);
    cudaEventDestroy(half.sent);
  }
}

std::byte* WeightUploader::next_half(std::size_t bytes) {
  Half& half = halves_[next_];
  check(cudaEventSynchronize(half.sent), "cudaEventSynchronize");
  return half.host.grow(bytes);
}

void WeightUploader::send(std::initializer_list<Part> parts) {
  Half& half = halves_[next_];
  next_ = 1 - next_;
  const std::byte* host = half.host.data();
  for (const Part& part : parts) {
    if (part.bytes == 0) continue;
    check(cudaMemcpyAsync(part.out, host, part.bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
    host += part.bytes;
  }
  check(cudaEventRecord(half.sent, stream_), "cudaEventRecord");
}

void WeightUploader::upload(const std::byte* data, std::size_t bytes, std::byte* out) {
  for (std::size_t begin = 0; begin < bytes; begin += kStagingBytes) {
    const std::size_t size = std::min(kStagingBytes, bytes - begin);
    upload({{out + begin, size}}, [&](std::byte* host) { copy(data + begin, size, host); });
  }
}

}  // namespace flash_mla::model
