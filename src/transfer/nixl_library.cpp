#include "transfer/nixl_library.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include "flash_mla/error.h"

namespace flash_mla::transfer {

NixlLibrary open_nixl(const std::string& path) {
  void* const library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
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
