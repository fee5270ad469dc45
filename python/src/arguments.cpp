#include "arguments.h"

#include <nanobind/stl/string.h>

#include <cstdlib>
#include <limits>
#include <new>
#include <string>

#include "flash_mla/error.h"

namespace nb = nanobind;

namespace flash_mla::python {

Workspace::~Workspace() { std::free(data_); }

void* Workspace::get(std::size_t bytes) {
  if (bytes > bytes_) {
    std::free(data_);
    bytes_ = (bytes + 63) / 64 * 64;
    data_ = std::aligned_alloc(64, bytes_);
    if (data_ == nullptr) {
      bytes_ = 0;
      throw std::bad_alloc();
    }
  }
  return data_;
}

Workspace& thread_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

int int_argument(nb::handle object, const char* name, int least) {
  int overflow = 0;
  long long value = least - 1LL;
  if (PyIndex_Check(object.ptr()) && !PyBool_Check(object.ptr())) {
    const nb::object index = nb::steal<nb::object>(PyNumber_Index(object.ptr()));
    if (!index.is_valid()) throw nb::python_error();
    value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  }
  if (overflow != 0 || value < least || value > std::numeric_limits<int>::max()) {
    throw InvalidArgument(std::string(name) + " is " + nb::cast<std::string>(nb::repr(object)) +
                          ", expected an integer from " + std::to_string(least) + " to " +
                          std::to_string(std::numeric_limits<int>::max()));
  }
  return static_cast<int>(value);
}

std::optional<float> scale_argument(nb::handle object) {
  if (object.is_none()) return std::nullopt;
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw InvalidArgument("softmax_scale is " + nb::cast<std::string>(nb::repr(object)) +
                          ", expected a positive finite number or None");
  }
  return static_cast<float>(value);
}

bool flag_argument(nb::handle object, const char* name) {
  const int truth = PyObject_IsTrue(object.ptr());
  if (truth < 0) {
    PyErr_Clear();
    throw InvalidArgument(std::string(name) + " is " + nb::cast<std::string>(nb::repr(object)) +
                          ", expected True or False");
  }
  return truth != 0;
}

}  // namespace flash_mla::python
