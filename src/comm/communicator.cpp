#include "comm/communicator.h"

#include <fmt/format.h>

#include <numeric>
#include <utility>

#include "flash_mla/error.h"

namespace flash_mla::comm {
namespace {

std::string shape(const Matrix& m) {
  return fmt::format("({}, {}) {}", m.rows, m.columns, dtype_name(m.dtype));
}

std::int64_t bytes_of(std::int64_t rows, const Matrix& m) {
  return rows * m.columns * static_cast<std::int64_t>(dtype_size(m.dtype));
}

void check_sum(const char* name, const Matrix& m) {
  if (m.dtype == DType::kFloat32 || m.dtype == DType::kBFloat16) return;
  throw InvalidArgument(fmt::format("{} is {}, expected float32 or bfloat16", name, dtype_name(m.dtype)));
}

// `whole` has the rows of all ranks, `part` those of one.
void check_parts(const char* part_name, const Matrix& part, const char* whole_name, const Matrix& whole,
                 int size) {
  if (whole.rows == size * part.rows && whole.columns == part.columns && whole.dtype == part.dtype) return;
  throw InvalidArgument(fmt::format("{} is {}, expected {} times the rows of {}, {}", whole_name,
                                    shape(whole), size, part_name, shape(part)));
}

void check_counts(const char* name, std::span<const std::int64_t> counts, const Matrix& m, int size) {
  if (std::ssize(counts) != size) {
    throw InvalidArgument(
        fmt::format("{} has {} counts, expected {}, one for each rank", name, counts.size(), size));
  }
  for (const std::int64_t count : counts) {
    if (count < 0) throw InvalidArgument(fmt::format("{} has a count of {}, expected >= 0", name, count));
  }
  const std::int64_t sum = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  if (sum != m.rows) {
    throw InvalidArgument(
        fmt::format("{} adds up to {}, expected {}, the rows of its matrix", name, sum, m.rows));
  }
}

}  // namespace

RankError::RankError(int rank, std::string reason)
    : std::runtime_error(fmt::format("rank {}: {}", rank, reason)), rank_(rank), reason_(std::move(reason)) {}

template <class F>
void Communicator::count(std::int64_t bytes, F&& call) {
  const auto begin = std::chrono::steady_clock::now();
  call();
  traffic_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  traffic_.bytes += bytes;
  ++traffic_.calls;
}

void Communicator::all_reduce(const Matrix& inout) {
  check_sum("inout", inout);
  // What any all-reduce sends at least.
  const std::int64_t bytes = 2 * bytes_of(inout.rows, inout) * (size() - 1) / size();
  count(bytes, [&] { do_all_reduce(inout); });
}

void Communicator::all_gather(const Matrix& in, const Matrix& out) {
  check_parts("in", in, "out", out, size());
  count(bytes_of(in.rows, in) * (size() - 1), [&] { do_all_gather(in, out); });
}

void Communicator::reduce_scatter(const Matrix& in, const Matrix& out) {
  check_sum("in", in);
  check_parts("out", out, "in", in, size());
  count(bytes_of(in.rows - out.rows, in), [&] { do_reduce_scatter(in, out); });
}

void Communicator::all_to_all_v(const Matrix& in, std::span<const std::int64_t> to, const Matrix& out,
                                std::span<const std::int64_t> from) {
  check_counts("to", to, in, size());
  check_counts("from", from, out, size());
  if (in.columns != out.columns || in.dtype != out.dtype) {
    throw InvalidArgument(
        fmt::format("out is {}, expected the columns and type of in, {}", shape(out), shape(in)));
  }
  const auto self = static_cast<std::size_t>(rank());
  if (to[self] != from[self]) {
    throw InvalidArgument(fmt::format("from[{0}] is {1}, expected to[{0}], {2}: both are this rank's own",
                                      self, from[self], to[self]));
  }
  count(bytes_of(in.rows - to[self], in), [&] { do_all_to_all_v(in, to, out, from); });
}

void Communicator::broadcast(const Matrix& inout, int root) {
  if (root < 0 || root >= size()) {
    throw InvalidArgument(fmt::format("root is {}, expected 0 to {}", root, size() - 1));
  }
  count(rank() == root ? bytes_of(inout.rows, inout) * (size() - 1) : 0, [&] { do_broadcast(inout, root); });
}

}  // namespace flash_mla::comm
