#pragma once

// What the functions of the C ABI share: exceptions become statuses, DLTensors views.

#include <exception>
#include <new>
#include <string>

#include "api/checks.h"
#include "flash_mla/c_api.h"
#include "flash_mla/dlpack.h"
#include "flash_mla/error.h"

namespace flash_mla::api {

inline std::string& last_error() {
  thread_local std::string message;
  return message;
}

inline flash_mla_status fail(flash_mla_status status, const char* message) noexcept {
  try {
    last_error() = message;
  } catch (...) {
    // Out of memory for the message itself: the status still tells.
  }
  return status;
}

/// Runs f and turns what it throws into a status.
template <class F>
flash_mla_status guarded(F&& f) noexcept {
  try {
    f();
    return FLASH_MLA_OK;
  } catch (const InvalidArgument& e) {
    return fail(FLASH_MLA_INVALID_ARGUMENT, e.what());
  } catch (const Unsupported& e) {
    return fail(FLASH_MLA_UNSUPPORTED, e.what());
  } catch (const std::bad_alloc&) {
    return fail(FLASH_MLA_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return fail(FLASH_MLA_INTERNAL, e.what());
  } catch (...) {
    return fail(FLASH_MLA_INTERNAL, "unknown error");
  }
}

template <class T>
const T& required(const T* p, const char* name) {
  if (p == nullptr) invalid("{} is NULL, expected a pointer", name);
  return *p;
}

inline TensorView view(const DLTensor* t, const char* name) { return from_dlpack(required(t, name), name); }

/// Not defined where t is NULL. Rank 0 would read as "not given" and is refused.
inline TensorView optional_view(const DLTensor* t, const char* name) {
  if (t == nullptr) return {};
  const TensorView v = from_dlpack(*t, name);
  if (v.rank == 0) invalid("{} has rank 0, expected a tensor or NULL", name);
  return v;
}

}  // namespace flash_mla::api
