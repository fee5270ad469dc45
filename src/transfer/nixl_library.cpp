#include "transfer/nixl_library.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include "flash_mla/error.h"

namespace flash_mla::transfer {
namespace {

#if defined(__has_feature)
#define FLASH_MLA_HAS_FEATURE(name) __has_feature(name)
#else
#define FLASH_MLA_HAS_FEATURE(name) 0
#endif

// NIXL brings a protobuf of its own, which must not meet gRPC's where this program has the client of LMCache's server: two
// in one set of symbols end the process. Sanitizers refuse the flag.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || \
    FLASH_MLA_HAS_FEATURE(address_sanitizer) || FLASH_MLA_HAS_FEATURE(thread_sanitizer)
constexpr int kOpen = RTLD_NOW | RTLD_LOCAL;
#else
constexpr int kOpen = RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND;
#endif

}  // namespace

NixlLibrary open_nixl(const std::string& path) {
  void* const library = ::dlopen(path.c_str(), kOpen);
  if (library == nullptr) {
    const char* const why = ::dlerror();  // NOLINT(concurrency-mt-unsafe): glibc's is per thread
    throw Unsupported(fmt::format(
        "NIXL's C library cannot be opened: {}; FLASH_MLA_NIXL names libnixl_capi.so of version 1.5",
        why == nullptr ? path : why));
  }
  NixlLibrary out{};
  const auto find = [&]<class Function>(Function& function, const char* name) {
    const std::string symbol = std::string("nixl_capi_") + name;
    function = reinterpret_cast<Function>(::dlsym(library, symbol.c_str()));
    if (function == nullptr)
      throw Unsupported(fmt::format("{} has no {}: expected version 1.5 of NIXL's C library", path, symbol));
  };
  find(out.create_agent, "create_agent");
  find(out.destroy_agent, "destroy_agent");
  find(out.get_plugin_params, "get_plugin_params");
  find(out.destroy_mem_list, "destroy_mem_list");
  find(out.destroy_params, "destroy_params");
  find(out.create_backend, "create_backend");
  find(out.destroy_backend, "destroy_backend");
  find(out.create_opt_args, "create_opt_args");
  find(out.destroy_opt_args, "destroy_opt_args");
  find(out.opt_args_add_backend, "opt_args_add_backend");
  find(out.create_reg_dlist, "create_reg_dlist");
  find(out.reg_dlist_add_desc, "reg_dlist_add_desc");
  find(out.destroy_reg_dlist, "destroy_reg_dlist");
  find(out.register_mem, "register_mem");
  find(out.deregister_mem, "deregister_mem");
  find(out.get_local_md, "get_local_md");
  find(out.load_remote_md, "load_remote_md");
  find(out.invalidate_remote_md, "invalidate_remote_md");
  find(out.create_xfer_dlist, "create_xfer_dlist");
  find(out.xfer_dlist_add_desc, "xfer_dlist_add_desc");
  find(out.destroy_xfer_dlist, "destroy_xfer_dlist");
  find(out.create_xfer_req, "create_xfer_req");
  find(out.post_xfer_req, "post_xfer_req");
  find(out.get_xfer_status, "get_xfer_status");
  find(out.release_xfer_req, "release_xfer_req");
  find(out.destroy_xfer_req, "destroy_xfer_req");
  return out;
}

}  // namespace flash_mla::transfer
