#pragma once

// Argument checks shared by the public functions. A backend never checks user input again.

#include <fmt/format.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "flash_mla/decode.h"
#include "flash_mla/error.h"

namespace flash_mla::api {

/// Rows of a schedule; far more than workers exist.
inline constexpr std::int64_t kMaxParts = 1 << 20;

template <class... Args>
[[noreturn]] void invalid(fmt::format_string<Args...> format, Args&&... args) {
  throw InvalidArgument(fmt::format(format, std::forward<Args>(args)...));
}

/// Rank, dtype, a pointer where there are elements, its alignment, no negative stride, and that the tensor's
/// bytes and addresses are numbers of 64 bits.
void check_tensor(const TensorView& t, const char* name, int rank, std::initializer_list<DType> dtypes);

/// `t.size(dim)` is `expected`, which is what `expected_name` says.
void check_size(const TensorView& t, const char* name, int dim, std::int64_t expected,
                const char* expected_name);

void check_last_dim_contiguous(const TensorView& t, const char* name);

/// No two elements of an output share an address.
void check_no_overlap(const TensorView& t, const char* name);

void check_same_device(const TensorView& t, const char* name, const TensorView& reference,
                       const char* reference_name);

/// Everything about a dense decode call that shapes, dtypes and devices tell. `allow_reference_types`:
/// float64 inputs, outputs of float32 or float64.
void check_dense_decode_shapes(const DenseDecodeArgs& args, const DenseDecodeOptions& options,
                               bool allow_reference_types);

/// Everything that the values of cache_seqlens and block_table tell. Host tensors only.
void check_dense_decode_values(const DenseDecodeArgs& args);

/// Shapes of a schedule, and that it belongs to a batch of `batch` requests.
void check_schedule_shapes(const DecodeScheduleView& schedule, std::int64_t batch, const TensorView& q);

/// That num_splits is an exclusive prefix sum of at least one split per request. Host tensors only.
void check_num_splits(const DecodeScheduleView& schedule);

/// That a schedule covers every block of every request exactly once. Host tensors only.
void check_schedule_values(const DecodeScheduleView& schedule, const TensorView& cache_seqlens);

}  // namespace flash_mla::api
