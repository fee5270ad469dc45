// Linked with the CPU backend as a build without OpenMP compiles it.

#include <gtest/gtest.h>

#include "kernels/attention/dense_decode/cpu/dense_decode.h"

namespace flash_mla {
namespace {

// With OMP_NUM_THREADS=4 in the environment this tells which of the two was linked.
TEST(NoOpenMp, IsWhatWasLinked) { EXPECT_EQ(cpu::default_num_threads(), 1); }

}  // namespace
}  // namespace flash_mla
