// dense_decode does not allocate: malloc and friends are counted while it runs.

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "base/element.h"
#include "problem.h"
#include "sparse_problem.h"

namespace {
std::atomic<long> g_allocations{0};
}

// operator new is counted here, malloc through it; code that calls malloc directly would escape, and none
// does.
void* operator new(std::size_t n) {
  ++g_allocations;
  if (void* p = std::malloc(n)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace flash_mla::conformance {
namespace {

TEST(NoAllocation, InDenseDecode) {
  const Problem p({.lengths = {900, 64, 0, 300}, .s_q = 2, .h_q = 16, .causal = true});
  std::vector<std::uint8_t> out;
  std::vector<float> lse;
  const DenseDecodeArgs a = p.host_args(out, lse);
  const auto schedule = DecodeSchedule::build(p.shape().lengths, cpu_schedule_options(3));
  const std::size_t bytes = dense_decode_workspace_size(a, schedule.view(), {.num_threads = 2});
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  dense_decode(a, schedule.view(), workspace, bytes, {.num_threads = 2});  // first use of the thread team
  const long before = g_allocations;
  for (int i = 0; i < 3; ++i) dense_decode(a, schedule.view(), workspace, bytes, {.num_threads = 2});
  EXPECT_EQ(g_allocations, before);
  std::free(workspace);
}

TEST(NoAllocation, InSparseDecode) {
  const SparseProblem p(
      {.b = 2, .s_q = 2, .keys = {.tokens = 2000, .topk = 900}, .has_extra = true, .sink = true});
  SparseDecodeArgs a = p.host_args();
  std::vector<Bf16> out(2 * 2 * 16 * 512);
  std::vector<float> lse(2 * 2 * 16);
  a.out = TensorView::contiguous(out.data(), DType::kBFloat16, {2, 2, 16, 512});
  a.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {2, 16, 2});
  const SparseDecodeOptions options{.fixed_split_blocks = 2, .num_threads = 2};
  const std::size_t bytes = sparse_decode_workspace_size(a, options);
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  sparse_decode(a, workspace, bytes, options);  // first use of the thread team
  const long before = g_allocations;
  for (int i = 0; i < 3; ++i) sparse_decode(a, workspace, bytes, options);
  EXPECT_EQ(g_allocations, before);
  std::free(workspace);
}

}  // namespace
}  // namespace flash_mla::conformance
