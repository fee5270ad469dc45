// The kernels over memory of several ranks, on the host: ranks are threads, which meet by the same counts.

#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "base/element.h"
#include "kernels/exchange/sm90/all_reduce_norm.h"
#include "kernels/exchange/sm90/gather_columns.h"
#include "kernels/moe/sm90/local_experts.h"
#include "queue.h"

namespace flash_mla::sm90 {
namespace {

using emulated::queue;

constexpr std::size_t kOwn = kMaxPeers;  // behind a word for each peer

/// False: the group has failed.
bool meet(const Peers& p) {
  std::uint32_t* const mine = p.flags[p.rank];
  const std::uint32_t count = ++mine[kOwn];
  for (int peer = 0; peer < p.size; ++peer) std::atomic_ref(p.flags[peer][p.rank]).store(count);
  for (int peer = 0; peer < p.size; ++peer) {
    while (static_cast<std::int32_t>(std::atomic_ref(mine[peer]).load() - count) < 0) {
      if (std::atomic_ref(*p.failed).load() != 0) return false;
      std::this_thread::yield();
    }
  }
  return true;
}

Bf16* row(void* data, std::int64_t row, std::int64_t columns) {
  return static_cast<Bf16*>(data) + row * columns;
}

void reduce_row(const AllReduceNorm& p, std::int64_t r) {
  float squares = 0;
  for (std::int64_t i = 0; i < p.hidden; ++i) {
    float sum = 0;
    for (int peer = 0; peer < p.peers.size; ++peer)
      sum += to_float(row(const_cast<void*>(p.partial[peer]), r, p.hidden)[i]);
    const Bf16 x = to_bf16(to_float(row(p.x[p.peers.rank], r, p.hidden)[i]) + sum);
    for (int peer = 0; peer < p.peers.size; ++peer) row(p.x[peer], r, p.hidden)[i] = x;
    squares += to_float(x) * to_float(x);
  }
  if (p.weight == nullptr) return;
  const float factor = 1 / std::sqrt(squares / static_cast<float>(p.hidden) + p.eps);
  for (std::int64_t i = 0; i < p.hidden; ++i) {
    const Bf16 normed = to_bf16(to_float(row(p.x[p.peers.rank], r, p.hidden)[i]) * factor * p.weight[i]);
    for (int peer = 0; peer < p.peers.size; ++peer) row(p.normed[peer], r, p.hidden)[i] = normed;
  }
}

}  // namespace

std::size_t peer_flags(int ctas) {
  return static_cast<std::size_t>(ctas) * (kOwn + 1) * sizeof(std::uint32_t);
}

void all_reduce_norm(const AllReduceNorm& p, cudaStream_t) {
  queue([=] {
    if (!meet(p.peers)) return;
    for (std::int64_t r = p.peers.rank; r < p.rows; r += p.peers.size) reduce_row(p, r);
    meet(p.peers);
  });
}

void gather_columns(const GatherColumns& p, cudaStream_t) {
  queue([=] {
    if (!meet(p.peers)) return;
    for (std::int64_t r = 0; r < p.rows; ++r) {
      for (int peer = 0; peer < p.peers.size; ++peer) {
        if (peer == p.peers.rank) continue;
        const std::int64_t at = r * p.pitch + p.first;
        std::memcpy(static_cast<char*>(p.whole[peer]) + at, static_cast<char*>(p.whole[p.peers.rank]) + at,
                    static_cast<std::size_t>(p.count));
      }
    }
    meet(p.peers);
  });
}

cudaError_t local_experts(const LocalExperts& p, cudaStream_t) {
  queue([=] {
    for (std::int64_t i = 0; i < p.tokens * p.experts_per_token; ++i) {
      const ExpertPlace& place = p.places[p.ids[i]];
      const std::int64_t turn = p.by_turn ? i / p.experts_per_token % place.replicas : 0;
      p.out[i] = place.index >= 0 && turn == place.turn ? place.index : -1;
    }
  });
  return cudaSuccess;
}

}  // namespace flash_mla::sm90
