#pragma once

#include <new>
#include <stdexcept>
#include <string>

namespace flash_mla {

/// An argument the caller passed is wrong. The message names the argument, its value and what was
/// expected; nothing has been written to any output when this is thrown.
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// The request is well formed, but this build, this machine or this version cannot serve it. The
/// message says why and what to use instead.
class Unsupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The memory that a model or its cache needs cannot be had. The message says how much and what for.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(const std::string& message) : message_(message) {}  // NOLINT: a member
  const char* what() const noexcept override { return message_.what(); }

 private:
  std::runtime_error message_;  // copied without an exception, as an exception must be
};

}  // namespace flash_mla
