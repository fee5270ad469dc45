#pragma once

// Where cuBLASLt is looked for. Needs none of CUDA's headers.

#include <filesystem>
#include <string>
#include <vector>

namespace flash_mla::sm90 {

/// Names for dlopen, in the order in which they are tried. First the library's own, which finds the one that the process
/// has (torch brings one) or the system's. Then the Python package nvidia-cublas in the site-packages that `own_file` is
/// installed in: as the package's extension (flash_mla_kernels/_C...so) or as its program (flash_mla_kernels/bin/flash-mla).
inline std::vector<std::string> cublaslt_paths(const std::filesystem::path& own_file, int major) {
  const std::string version = std::to_string(major);
  std::string name = "libcublasLt.so.", folder_name = "cu";
  name += version;
  folder_name += version;
  std::vector<std::string> paths{name};
  const std::filesystem::path folder = own_file.parent_path();
  for (const std::filesystem::path& package : {folder, folder.parent_path()}) {
    if (package.filename() != "flash_mla_kernels") continue;
    paths.push_back(package.parent_path() / "nvidia" / folder_name / "lib" / name);
  }
  return paths;
}

}  // namespace flash_mla::sm90
