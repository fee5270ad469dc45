#include <cstring>

#include "kernels/cache/cpu/tokens.h"
#include "kernels/cache/pages.h"

namespace flash_mla::cpu {
namespace {

/// A token's heads from rows (n, h, d) into a pool (num_pages, page_size, h, d).
void copy_token(const TensorView& rows, std::int64_t token, const TensorView& pool, PlaceInPages place) {
  const std::size_t element = dtype_size(rows.dtype);
  const auto address = [&](const TensorView& t, std::int64_t at) {
    return t.ptr<std::uint8_t>() + at * static_cast<std::int64_t>(element);
  };
  const std::uint8_t* from = address(rows, token * rows.stride(0));
  std::uint8_t* to = address(pool, place.page * pool.stride(0) + place.offset * pool.stride(1));
  for (std::int64_t h = 0; h < rows.size(1); ++h) {
    std::memcpy(to + h * pool.stride(2) * static_cast<std::int64_t>(element),
                from + h * rows.stride(1) * static_cast<std::int64_t>(element),
                static_cast<std::size_t>(rows.size(2)) * element);
  }
}

}  // namespace

void append_pages(const PageAppendArgs& args, int num_threads) {
  for_each_token(args.key.size(0), num_threads, [&](std::int64_t token) {
    const PlaceInPages place = place_of(args, token);
    copy_token(args.key, token, args.k_cache, place);
    if (args.value.defined()) copy_token(args.value, token, args.v_cache, place);
  });
}

}  // namespace flash_mla::cpu
