#include "model/device/cuda/nccl_library.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <cstdlib>

#include "flash_mla/error.h"

namespace flash_mla::model {
namespace {

struct Opened {
  NcclLibrary functions{};
  std::string why_not;
};

Opened open_once() {
  Opened out;
  const char* const named = std::getenv("FLASH_MLA_NCCL");
  const std::string path = named != nullptr ? named : "libnccl.so.2";
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    out.why_not = fmt::format("NCCL cannot be opened (FLASH_MLA_NCCL names its library): {}", dlerror());
    return out;
  }
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) out.why_not = fmt::format("{} has no {}", path, name);
  };
  find(out.functions.get_error_string, "ncclGetErrorString");
  find(out.functions.get_unique_id, "ncclGetUniqueId");
  find(out.functions.init_rank, "ncclCommInitRank");
  find(out.functions.abort, "ncclCommAbort");
  find(out.functions.destroy, "ncclCommDestroy");
  find(out.functions.all_reduce, "ncclAllReduce");
  find(out.functions.all_gather, "ncclAllGather");
  return out;
}

const Opened& opened() {
  static const Opened kOpened = open_once();
  return kOpened;
}

}  // namespace

const NcclLibrary& open_nccl() {
  if (!opened().why_not.empty()) throw Unsupported(opened().why_not);
  return opened().functions;
}

std::string why_no_nccl() { return opened().why_not; }

}  // namespace flash_mla::model
