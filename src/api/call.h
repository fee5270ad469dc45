#pragma once

// What the entry points of every operation do alike: the backend a call runs on, and its workspace.

#include <cstddef>
#include <cstdint>

#include "api/checks.h"

namespace flash_mla::api {

inline constexpr std::uintptr_t kWorkspaceAlignment = 64;

/// The backend that `wanted` means for tensors on the device of `t`.
inline Backend backend_of(Backend wanted, const TensorView& t, const char* name) {
  const bool on_cpu = t.device.type == DeviceType::kCpu;
  if (wanted == Backend::kAuto) return on_cpu ? Backend::kCpu : Backend::kSm90;
  if (on_cpu != (wanted == Backend::kCpu)) {
    invalid("{} is {}, expected a tensor the {} backend can use", name, t.describe(), backend_name(wanted));
  }
  return wanted;
}

/// `function` is the one that says how many bytes are needed.
inline void check_workspace_bytes(const void* workspace, std::size_t workspace_bytes, std::size_t needed,
                                  const char* function) {
  if (workspace_bytes < needed) {
    invalid("workspace_bytes is {}, expected at least {}() = {}", workspace_bytes, function, needed);
  }
  if (needed > 0 && workspace == nullptr) invalid("workspace is null, expected {} bytes", needed);
  if (reinterpret_cast<std::uintptr_t>(workspace) % kWorkspaceAlignment != 0) {
    invalid("workspace is {}, expected a pointer aligned to {} bytes", fmt::ptr(workspace),
            kWorkspaceAlignment);
  }
}

}  // namespace flash_mla::api
