#pragma once

#include <string>
#include <vector>

namespace flash_mla::bench {

/// A plain-text table: columns as wide as their widest cell, the first left-aligned, the others right.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_{std::move(header)} {}
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string str() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace flash_mla::bench
