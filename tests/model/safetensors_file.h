#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"

namespace flash_mla {

/// The bytes of a safetensors file with this header text, whatever it says.
inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  std::string out;
  for (int i = 0; i < 8; ++i) out += static_cast<char>((header.size() >> (8 * i)) & 255);
  return out + header + data;
}

/// Builds a well-formed file tensor by tensor.
class SafetensorsFile {
 public:
  SafetensorsFile& add(const std::string& name, const std::string& dtype, std::vector<std::int64_t> shape,
                       const std::string& bytes) {
    header_[name] = {{"dtype", dtype},
                     {"shape", std::move(shape)},
                     {"data_offsets", {data_.size(), data_.size() + bytes.size()}}};
    data_ += bytes;
    return *this;
  }
  template <typename Element>
  SafetensorsFile& add(const std::string& name, const std::string& dtype, std::vector<std::int64_t> shape,
                       const std::vector<Element>& elements) {
    return add(
        name, dtype, std::move(shape),
        std::string(reinterpret_cast<const char*>(elements.data()), elements.size() * sizeof(Element)));
  }
  std::string bytes() const { return safetensors_bytes(header_.dump(), data_); }

 private:
  Json header_ = Json::object();
  std::string data_;
};

}  // namespace flash_mla
