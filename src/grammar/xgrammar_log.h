#pragma once

#include <string>
#include <vector>

namespace flash_mla::grammar {

/// What XGrammar warns of on this thread while the object lives: a part of a grammar that it passes over. One at
/// a time on a thread.
class Warnings {
 public:
  Warnings();
  ~Warnings();
  Warnings(const Warnings&) = delete;
  Warnings& operator=(const Warnings&) = delete;

  const std::vector<std::string>& messages() const { return messages_; }

 private:
  std::vector<std::string> messages_;
};

}  // namespace flash_mla::grammar
