#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "comm/communicator.h"

namespace flash_mla::comm {

/// Ranks that are threads of one process, with matrices in its memory: a rank reads those of the others where they lie.
class ThreadGroup {
 public:
  /// Throws InvalidArgument unless size >= 1. `timeout`: how long a rank waits for the others.
  explicit ThreadGroup(int size, std::chrono::milliseconds timeout = kTimeout);
  /// The same, part of a larger group: `numbers` are what errors call its ranks.
  ThreadGroup(std::vector<int> numbers, std::chrono::milliseconds timeout);
  ~ThreadGroup();

  /// Of one rank, for one thread at a time; the group must outlive it.
  std::unique_ptr<Communicator> communicator(int rank);

  /// Forgets a failure. No rank may be in a call.
  void reset();

 private:
  struct Shared;
  class Rank;
  std::unique_ptr<Shared> shared_;
};

}  // namespace flash_mla::comm
