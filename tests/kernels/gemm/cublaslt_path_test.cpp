#include "kernels/gemm/sm90/cublaslt_path.h"

#include <gtest/gtest.h>

namespace flash_mla::sm90 {
namespace {

using Paths = std::vector<std::string>;

TEST(CublasLtPath, IsTheSystemsAndThenThatOfThePythonPackageBesideOurs) {
  const Paths beside{"libcublasLt.so.13",
                     "/venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcublasLt.so.13"};
  EXPECT_EQ(cublaslt_paths("/venv/lib/python3.12/site-packages/flash_mla_kernels/_C.abi3.so", 13), beside);
  EXPECT_EQ(cublaslt_paths("/venv/lib/python3.12/site-packages/flash_mla_kernels/bin/flash-mla", 13), beside);
}

TEST(CublasLtPath, IsTheSystemsWhereNoPythonPackageIs) {
  const Paths system{"libcublasLt.so.12"};
  for (const char* own : {"/usr/bin/flash-mla", "build/release/src/cli/flash-mla", "flash-mla", ""}) {
    EXPECT_EQ(cublaslt_paths(own, 12), system) << own;
  }
}

}  // namespace
}  // namespace flash_mla::sm90
