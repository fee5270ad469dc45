#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <optional>

namespace flash_mla::python {

/// Scratch memory of one thread: grown when a call needs more, kept until the thread ends.
class Workspace {
 public:
  ~Workspace();
  void* get(std::size_t bytes);

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

Workspace& thread_workspace();

/// An integer argument: anything with __index__ but bool.
int int_argument(nanobind::handle object, const char* name, int least);

/// softmax_scale: a number, or None.
std::optional<float> scale_argument(nanobind::handle object);

bool flag_argument(nanobind::handle object, const char* name);

}  // namespace flash_mla::python
