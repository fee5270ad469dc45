#include "grammar/nfa.h"

#include <algorithm>
#include <utility>

namespace flash_mla::grammar {

bool Nfa::trim() {
  std::vector<std::vector<int>> before(edges.size());
  for (std::size_t from = 0; from < edges.size(); ++from) {
    for (const Edge& edge : edges[from]) {
      before[static_cast<std::size_t>(edge.target)].push_back(static_cast<int>(from));
    }
  }
  std::vector<char> alive(edges.size());
  alive[static_cast<std::size_t>(end)] = 1;
  std::vector<int> queue{end};
  while (!queue.empty()) {
    const auto state = static_cast<std::size_t>(queue.back());
    queue.pop_back();
    for (const int from : before[state]) {
      if (std::exchange(alive[static_cast<std::size_t>(from)], 1) == 0) queue.push_back(from);
    }
  }
  for (auto& of_state : edges) {
    std::erase_if(of_state, [&](const Edge& e) { return alive[static_cast<std::size_t>(e.target)] == 0; });
  }
  return alive[static_cast<std::size_t>(start)] != 0;
}

void StateSets::close(std::vector<int>& set) {
  ++turn_;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < set.size(); ++i) {
    const int state = set[i];
    if (std::exchange(seen_[static_cast<std::size_t>(state)], turn_) == turn_) continue;
    set[kept++] = state;
    for (const Nfa::Edge& edge : nfa_.edges[static_cast<std::size_t>(state)]) {
      ++num_edges_;
      if (edge.first < 0 && seen_[static_cast<std::size_t>(edge.target)] != turn_) set.push_back(edge.target);
    }
  }
  set.resize(kept);
  std::ranges::sort(set);
}

std::vector<int> StateSets::step(const std::vector<int>& set, unsigned char byte) {
  std::vector<int> out;
  for (const int from : set) {
    for (const Nfa::Edge& edge : nfa_.edges[static_cast<std::size_t>(from)]) {
      ++num_edges_;
      if (edge.first <= byte && byte <= edge.last) out.push_back(edge.target);
    }
  }
  close(out);
  return out;
}

}  // namespace flash_mla::grammar
