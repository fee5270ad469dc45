#pragma once

// A thread block of a GPU on one thread of the CPU: device code compiles against the headers of this folder in place of
// CUDA's and of src/kernels/ptx, and runs with every thread a fiber. What is asynchronous on a GPU happens late here: a
// copy at some later switch, products only when they are waited for. Which thread goes on at a switch is random. So a
// barrier too few, a buffer written too early, or a wait that nobody ends shows in results or as DeadlockError; races
// between two switches, and what the hardware says about registers, do not.

#include <ucontext.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulated {

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};

struct DeadlockError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// An mbarrier: `phase` is the parity of the one that is not complete.
struct Barrier {
  int expected = 0, pending = 0;
  std::int64_t bytes = 0;
  unsigned phase = 0;
};

/// Threads that meet: a named barrier, a warp, a warpgroup.
struct Meeting {
  int arrived = 0;
  std::uint64_t generation = 0;
  bool any = false, result = false;
};

/// One m64nNk16 that a thread has issued, or with `e4m3` m64nNk32; A is in registers or, where `a_shared` is not 0 or
/// `shared` is set, in shared memory.
struct Product {
  float* sums;
  int count;
  std::array<std::uint32_t, 4> a;
  std::uint64_t b;
  bool bf16, accumulate;
  bool e4m3 = false;
  std::uint64_t a_shared = 0;
  bool shared = false;
  bool mn_major = false;  // B
};

class Block {
 public:
  Block(int threads, std::byte* shared, std::size_t shared_bytes, unsigned seed)
      : shared_(shared),
        shared_bytes_(shared_bytes),
        fibers_(static_cast<std::size_t>(threads)),
        rng_(seed) {}

  /// Runs `body` in every thread.
  void run(const std::function<void()>& body);

  static Block& current() { return *current_block(); }

  // ---- of the running thread
  unsigned thread() const { return static_cast<unsigned>(running_); }
  Dim3 block_index{}, grid_size{};
  /// `at` goes into a DeadlockError's text.
  void wait_until(std::function<bool()> ready, std::string at);
  std::uint32_t shared_address(const void* p) const {
    return static_cast<std::uint32_t>(static_cast<const std::byte*>(p) - shared_);
  }
  std::byte* shared_at(std::uint32_t address, std::size_t bytes) {
    if (address + bytes > shared_bytes_) throw std::out_of_range("shared memory");
    return shared_ + address;
  }

  Barrier& barrier(std::uint64_t* b) { return barriers_[b]; }
  static void settle(Barrier& b);
  void later(std::function<void()> event) { events_.push_back(std::move(event)); }

  /// Counts in; waits for the others if `stays`.
  bool meet(int key, int threads, bool stays, bool any = false);
  void meet_block() { meet(0, static_cast<int>(fibers_.size()), true); }
  void meet_warp() { meet(1000 + static_cast<int>(thread() / 32), 32, true); }

  /// What the other lanes of the warp gave, until the next exchange.
  const std::array<std::uint64_t, 32>& exchange(std::uint64_t mine);

  void issue(const Product& p) { fiber().products.push_back(p); }
  /// Bytes of asynchronous copies that the running thread has asked for since it last asked for an arrival.
  std::vector<std::function<void()>>& copies() { return fiber().copies; }
  /// Of the running thread, the copies of each group that it has committed and not waited for.
  std::deque<std::vector<std::function<void()>>>& copy_groups() { return fiber().copy_groups; }
  void commit() { fiber().groups.push_back(fiber().products.size()); }
  void wait_for_products(int pending);

  static float half_to_float(std::uint16_t bits);
  static float bf16_to_float(std::uint16_t bits);

 private:
  struct Fiber {
    ucontext_t context{};
    std::vector<char> stack;
    std::function<bool()> ready;
    std::string waits_at;
    bool done = false;
    std::vector<Product> products;    // issued
    std::vector<std::size_t> groups;  // ends of groups
    std::size_t executed = 0, groups_done = 0;
    std::vector<std::function<void()>> copies;
    std::deque<std::vector<std::function<void()>>> copy_groups;
  };
  static Block*& current_block() {
    static Block* block = nullptr;
    return block;
  }
  Fiber& fiber() { return fibers_[running_]; }
  void execute(const Product& p, std::size_t index);
  void execute_e4m3(const Product& p, std::size_t index);
  static void enter();

  std::byte* shared_;
  std::size_t shared_bytes_;
  std::vector<Fiber> fibers_;
  std::mt19937 rng_;
  std::size_t running_ = 0;
  struct Stall {
    std::size_t first = 0, width = 1;  // warps
    std::size_t passes = 0;
  };
  std::array<Stall, 4> stalled_;
  ucontext_t scheduler_{};
  const std::function<void()>* body_ = nullptr;
  std::map<std::uint64_t*, Barrier> barriers_;
  std::map<int, Meeting> meetings_;
  std::vector<std::function<void()>> events_;
  std::map<unsigned, std::array<std::uint64_t, 32>> exchanged_;
  std::exception_ptr error_;
};

}  // namespace emulated
