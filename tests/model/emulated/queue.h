#pragma once

// What is queued on an emulated CUDA stream: it runs at once, or while a graph is captured joins the graph. Arguments
// are captured by value, as a launch's are: what a step finds in memory when a graph is replayed is all that may differ.

#include <functional>
#include <string>
#include <vector>

namespace flash_mla::emulated {

struct Operation {
  std::string name;
  std::function<void()> run;
};
using Graph = std::vector<Operation>;

void queue(const char* name, std::function<void()> run);

/// Since the program began: operations that ran, by name in their order, if `keep_trace` was called.
void keep_trace(bool on);
const std::vector<std::string>& trace();
/// Graphs that were replayed.
int replays();

}  // namespace flash_mla::emulated
