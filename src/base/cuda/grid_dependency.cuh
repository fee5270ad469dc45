#pragma once

// Programmatic dependent launch: a kernel may be set up while the one before it on the stream still runs.

namespace flash_mla::sm90::ptx {

/// Waits until the kernel this one was launched behind has finished (or triggered) and its writes are
/// visible.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
/// Lets the kernel behind this one start.
__device__ __forceinline__ void grid_dependency_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace flash_mla::sm90::ptx
