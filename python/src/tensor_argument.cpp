#include "tensor_argument.h"

#include <nanobind/stl/string.h>

#include <string>

#include "flash_mla/dlpack.h"
#include "flash_mla/error.h"

namespace nb = nanobind;

namespace flash_mla::python {
namespace {

// DLPack 1.3's C exchange API, as far as it is used here (the layout is part of DLPack's ABI).
struct ExchangeApi {
  struct {
    std::uint32_t major, minor;
  } version;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
  void* current_work_stream;
};

// The exchange API of a type, or nullptr; the last type seen is remembered.
const ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const ExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  const ExchangeApi* api = nullptr;
  nb::object attribute =
      nb::getattr(nb::handle(reinterpret_cast<PyObject*>(type)), "__dlpack_c_exchange_api__", nb::none());
  if (PyCapsule_CheckExact(attribute.ptr())) {
    api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(attribute.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) PyErr_Clear();
    if (api != nullptr && (api->version.major != 1 || api->dltensor_from_py_object_no_sync == nullptr))
      api = nullptr;
  }
  Py_INCREF(type);  // a remembered type never goes away and comes back as another at the same address
  last_type = type;
  last_api = api;
  return api;
}

// A NumPy array whose dtype is named bfloat16 (ml_dtypes).
bool view_of_bfloat16_array(nb::handle object, TensorView& view) {
  nb::object interface = nb::getattr(object, "__array_interface__", nb::none());
  if (!nb::isinstance<nb::dict>(interface)) return false;
  if (nb::cast<std::string>(nb::str(nb::getattr(nb::getattr(object, "dtype"), "name"))) != "bfloat16")
    return false;
  const auto shape = nb::cast<nb::tuple>(nb::getattr(object, "shape"));
  const auto strides = nb::cast<nb::tuple>(nb::getattr(object, "strides"));
  if (shape.size() > TensorView::kMaxRank) return false;
  view = TensorView{};
  view.dtype = DType::kBFloat16;
  view.rank = static_cast<int>(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) {
    view.shape[i] = nb::cast<std::int64_t>(shape[i]);
    const auto bytes = nb::cast<std::int64_t>(strides[i]);
    if (bytes % 2 != 0) return false;
    view.strides[i] = bytes / 2;
  }
  const auto data = nb::cast<nb::tuple>(nb::cast<nb::dict>(interface)["data"]);
  view.data = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(data[0]));
  return true;
}

}  // namespace

TensorArgument::TensorArgument(nb::handle object, const char* name) {
  if (const ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
    DLTensor t;
    if (api->dltensor_from_py_object_no_sync(object.ptr(), &t) == 0) {
      view_ = from_dlpack(t, name);
      return;
    }
    PyErr_Clear();
  }
  if (view_of_bfloat16_array(object, view_)) return;
  nb::object method = nb::getattr(object, "__dlpack__", nb::none());
  if (method.is_none()) {
    throw InvalidArgument(std::string(name) + " is of type " + Py_TYPE(object.ptr())->tp_name +
                          ", expected a torch tensor, a NumPy array or anything else with __dlpack__");
  }
  try {
    // Work is queued on the stream that the tensor is used on, so its producer need not synchronise another.
    nb::object device = nb::getattr(object, "__dlpack_device__", nb::none());
    const bool cuda = !device.is_none() && nb::cast<int>(nb::object(device()[0])) == 2;
    capsule_ = cuda ? method(nb::arg("stream") = -1) : method();
  } catch (nb::python_error& e) {
    throw InvalidArgument(std::string(name) + " does not export itself through DLPack: " + e.what());
  }
  // Versioned capsules are asked for by max_version only, so this is DLManagedTensor, whose first member is
  // the DLTensor.
  void* managed = PyCapsule_GetPointer(capsule_.ptr(), "dltensor");
  if (managed == nullptr) {
    PyErr_Clear();
    throw InvalidArgument(std::string(name) + " returned no \"dltensor\" capsule from __dlpack__");
  }
  view_ = from_dlpack(*static_cast<const DLTensor*>(managed), name);
}

}  // namespace flash_mla::python
