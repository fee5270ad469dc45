#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace flash_mla::transfer {

// What we use of the C interface of NIXL 1.5 (libnixl_capi.so, whose header the wheels do not have), in our own words:
// names and types of arguments, all handles opaque pointers. Calls return 0, 1 (a transfer goes on) or an error below 0.

inline constexpr int kNixlInProgress = 1;
inline constexpr int kNixlHostMemory = 0;
inline constexpr int kNixlWrite = 1;

using NixlHandle = void*;
using NixlStatus = int;

/// The functions, each by the name behind "nixl_capi_".
struct NixlLibrary {
  NixlStatus (*create_agent)(const char* name, NixlHandle* agent);
  NixlStatus (*destroy_agent)(NixlHandle agent);
  NixlStatus (*get_plugin_params)(NixlHandle agent, const char* plugin, NixlHandle* memories,
                                  NixlHandle* params);
  NixlStatus (*destroy_mem_list)(NixlHandle memories);
  NixlStatus (*destroy_params)(NixlHandle params);
  NixlStatus (*create_backend)(NixlHandle agent, const char* plugin, NixlHandle params, NixlHandle* backend);
  NixlStatus (*destroy_backend)(NixlHandle backend);
  NixlStatus (*create_opt_args)(NixlHandle* args);
  NixlStatus (*destroy_opt_args)(NixlHandle args);
  NixlStatus (*opt_args_add_backend)(NixlHandle args, NixlHandle backend);
  NixlStatus (*create_reg_dlist)(int memory, NixlHandle* list, bool sorted);
  NixlStatus (*reg_dlist_add_desc)(NixlHandle list, std::uintptr_t address, std::size_t bytes,
                                   std::uint64_t device, const void* metadata, std::size_t metadata_bytes);
  NixlStatus (*destroy_reg_dlist)(NixlHandle list);
  NixlStatus (*register_mem)(NixlHandle agent, NixlHandle list, NixlHandle args);
  NixlStatus (*deregister_mem)(NixlHandle agent, NixlHandle list, NixlHandle args);
  NixlStatus (*get_local_md)(NixlHandle agent, void** data, std::size_t* bytes);  ///< data: to be freed
  NixlStatus (*load_remote_md)(NixlHandle agent, const void* data, std::size_t bytes,
                               char** name);  ///< name, too
  NixlStatus (*invalidate_remote_md)(NixlHandle agent, const char* name);
  NixlStatus (*create_xfer_dlist)(int memory, NixlHandle* list, bool sorted);
  NixlStatus (*xfer_dlist_add_desc)(NixlHandle list, std::uintptr_t address, std::size_t bytes,
                                    std::uint64_t device);
  NixlStatus (*destroy_xfer_dlist)(NixlHandle list);
  NixlStatus (*create_xfer_req)(NixlHandle agent, int operation, NixlHandle local, NixlHandle remote,
                                const char* name, NixlHandle* request, NixlHandle args);
  NixlStatus (*post_xfer_req)(NixlHandle agent, NixlHandle request, NixlHandle args);
  NixlStatus (*get_xfer_status)(NixlHandle agent, NixlHandle request);
  NixlStatus (*release_xfer_req)(NixlHandle agent, NixlHandle request);
  NixlStatus (*destroy_xfer_req)(NixlHandle request);
};

/// Opens the library, which then stays. Throws Unsupported where it is not there or lacks one of the functions.
NixlLibrary open_nixl(const std::string& path);

}  // namespace flash_mla::transfer
