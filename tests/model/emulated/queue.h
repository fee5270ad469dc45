#pragma once

// What is queued on an emulated CUDA stream: it runs at once, or while a graph is captured joins the graph. Arguments
// are captured by value, as a launch's are: what a step finds in memory when a graph is replayed is all that may differ.

#include <functional>

namespace flash_mla::emulated {

void queue(std::function<void()> run);

}  // namespace flash_mla::emulated
