#pragma once

#include <cstddef>
#include <memory>
#include <utility>

namespace flash_mla {

/// Memory of a device, owned together with every copy of this object. Whoever passes it around never looks
/// inside.
class Buffer {
 public:
  Buffer() = default;
  Buffer(std::shared_ptr<std::byte> data, std::size_t bytes) : data_(std::move(data)), bytes_(bytes) {}
  std::byte* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<std::byte> data_;
  std::size_t bytes_ = 0;
};

}  // namespace flash_mla
