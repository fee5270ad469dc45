#include "model/device/cpu/expert_exchange.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace flash_mla::model {
namespace {

void copy_row(const std::byte* from, std::byte* to, const Matrix& of) {
  std::memcpy(to, from, static_cast<std::size_t>(of.columns) * dtype_size(of.dtype));
}

template <class T>
Matrix matrix_of(std::vector<T>& values, DType dtype, std::int64_t columns) {
  return {reinterpret_cast<std::byte*>(values.data()), dtype, std::ssize(values) / columns, columns, columns};
}

std::int64_t sum(const std::vector<std::int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

}  // namespace

// How many rows each rank has for this one.
std::vector<std::int64_t> CpuExpertExchange::counts_from_others(std::span<const std::int64_t> to) {
  const auto ranks = to.size(), self = static_cast<std::size_t>(context_.partition.expert_rank);
  std::vector<std::int64_t> own(to.begin(), to.end()), all(ranks * ranks);
  context_.expert_ranks->all_gather(matrix_of(own, DType::kInt64, std::ssize(own)),
                                    matrix_of(all, DType::kInt64, std::ssize(own)));
  std::vector<std::int64_t> out;
  for (std::size_t rank = 0; rank < ranks; ++rank) out.push_back(all[rank * ranks + self]);
  return out;
}

Matrix CpuExpertExchange::dispatch(const Matrix& h, std::span<const std::int32_t> experts,
                                   std::span<const int> ranks) {
  const auto size = static_cast<std::size_t>(context_.partition.expert_ranks);
  const std::int64_t chosen = context_.config.num_experts_per_tok;
  ranks_.assign(ranks.begin(), ranks.end());
  std::vector<std::int64_t> rows;  // of h, rank after rank
  sent_rows_.assign(size, 0);
  sent_experts_.clear();
  for (std::size_t rank = 0; rank < size; ++rank) {
    for (std::int64_t t = 0; t < h.rows; ++t) {
      const auto first = static_cast<std::size_t>(t * chosen), count = static_cast<std::size_t>(chosen);
      const std::span<const int> of_token = ranks.subspan(first, count);
      if (std::ranges::find(of_token, static_cast<int>(rank)) == of_token.end()) continue;
      rows.push_back(t);
      ++sent_rows_[rank];
      for (std::size_t i = 0; i < count; ++i) {
        sent_experts_.push_back(of_token[i] == static_cast<int>(rank) ? experts[first + i] : -1);
      }
    }
  }
  received_rows_ = counts_from_others(sent_rows_);
  received_experts_.resize(static_cast<std::size_t>(sum(received_rows_) * chosen));
  context_.expert_ranks->all_to_all_v(matrix_of(sent_experts_, DType::kInt32, chosen), sent_rows_,
                                      matrix_of(received_experts_, DType::kInt32, chosen), received_rows_);

  const Matrix sent = context_.activations(context_.buffers.sent, std::ssize(rows), h.columns);
  for (std::int64_t i = 0; i < sent.rows; ++i)
    copy_row(h.row(rows[static_cast<std::size_t>(i)]), sent.row(i), h);
  const Matrix received = context_.activations(context_.buffers.gathered, sum(received_rows_), h.columns);
  context_.expert_ranks->all_to_all_v(sent, sent_rows_, received, received_rows_);
  return received;
}

Matrix CpuExpertExchange::combine(const Matrix& results, std::vector<std::int64_t>& places) {
  const auto size = static_cast<std::size_t>(context_.partition.expert_ranks);
  const std::int64_t chosen = context_.config.num_experts_per_tok;
  // A row for each choice, in the order in which the rows came.
  const Matrix sent =
      CpuContext::matrix(context_.buffers.sent, DType::kFloat32, results.rows, results.columns);
  std::vector<std::int64_t> to(size, 0), from(size, 0), next(size, 0);
  std::int64_t at = 0, choice = 0;
  for (std::size_t rank = 0; rank < size; ++rank) {
    for (const std::int64_t end = choice + received_rows_[rank] * chosen; choice < end; ++choice) {
      const std::int64_t place = places[static_cast<std::size_t>(choice)];
      if (place < 0) continue;
      copy_row(results.row(place), sent.row(at++), results);
      ++to[rank];
    }
  }
  for (const int rank : ranks_) ++from[static_cast<std::size_t>(rank)];
  const Matrix received =
      CpuContext::matrix(context_.buffers.received, DType::kFloat32, std::ssize(ranks_), results.columns);
  context_.expert_ranks->all_to_all_v(sent, to, received, from);

  std::exclusive_scan(from.begin(), from.end(), next.begin(), std::int64_t{0});
  places.clear();
  for (const int rank : ranks_) places.push_back(next[static_cast<std::size_t>(rank)]++);
  return received;
}

}  // namespace flash_mla::model
