#include "tensor_argument.h"

#include <nanobind/stl/string.h>

#include <optional>
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
  // A remembered type never goes away and comes back as another at the same address.
  nb::handle(reinterpret_cast<PyObject*>(type)).inc_ref();
  last_type = type;
  last_api = api;
  return api;
}

// NumPy's name of a dtype this library has, in the byte order of the machine.
std::optional<DType> dtype_of_array(nb::handle object) {
  const nb::object dtype = nb::getattr(object, "dtype");
  const auto name = nb::cast<std::string>(nb::str(nb::getattr(dtype, "name")));
  // ml_dtypes' bfloat16 has a byte order of its own making.
  if (name == "bfloat16") return DType::kBFloat16;
  if (!nb::cast<bool>(nb::getattr(dtype, "isnative"))) return std::nullopt;
  for (const DType known :
       {DType::kFloat32, DType::kFloat16, DType::kFloat64, DType::kInt32, DType::kInt64, DType::kUInt8}) {
    if (name == dtype_name(known)) return known;
  }
  return std::nullopt;
}

// A NumPy array by its own protocol: DLPack has no read-only arrays before version 1 and none of
// ml_dtypes.bfloat16 at all.
bool view_of_array(nb::handle object, const char* name, TensorView& view) {
  nb::object interface = nb::getattr(object, "__array_interface__", nb::none());
  if (!nb::isinstance<nb::dict>(interface) || !nb::hasattr(object, "dtype")) return false;
  const std::optional<DType> dtype = dtype_of_array(object);
  if (!dtype) {
    throw InvalidArgument(
        std::string(name) + " is an array of dtype " +
        nb::cast<std::string>(nb::str(nb::getattr(object, "dtype"))) +
        ", expected float16, bfloat16, float32, float64, int32, int64 or uint8 in native byte "
        "order");
  }
  const auto shape = nb::cast<nb::tuple>(nb::getattr(object, "shape"));
  const auto strides = nb::cast<nb::tuple>(nb::getattr(object, "strides"));
  if (shape.size() > TensorView::kMaxRank) {
    throw InvalidArgument(std::string(name) + " has rank " + std::to_string(shape.size()) +
                          ", expected 0 to " + std::to_string(TensorView::kMaxRank));
  }
  view = TensorView{};
  view.dtype = *dtype;
  view.rank = static_cast<int>(shape.size());
  const auto element = static_cast<std::int64_t>(dtype_size(*dtype));
  for (std::size_t i = 0; i < shape.size(); ++i) {
    view.shape[i] = nb::cast<std::int64_t>(shape[i]);
    const auto bytes = nb::cast<std::int64_t>(strides[i]);
    if (bytes % element != 0 && view.shape[i] > 1) {
      throw InvalidArgument(std::string(name) + " has a stride of " + std::to_string(bytes) +
                            " bytes, expected a multiple of its element's " + std::to_string(element));
    }
    view.strides[i] = bytes / element;
  }
  const auto data = nb::cast<nb::tuple>(nb::cast<nb::dict>(interface)["data"]);
  view.data = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(data[0]));
  return true;
}

// DLPack 1.0's DLManagedTensorVersioned, which not every dlpack.h has (the layout is part of DLPack's ABI).
struct VersionedTensor {
  struct {
    std::uint32_t major, minor;
  } version;
  void* manager_ctx;
  void* deleter;
  std::uint64_t flags;
  DLTensor tensor;
};

// The export of an object with __dlpack__, versioned where the object knows of versions: only then may it be
// read-only, which is all the same to an input.
nb::object export_through_dlpack(nb::handle object, const char* name) {
  const nb::object method = nb::getattr(object, "__dlpack__", nb::none());
  if (method.is_none()) {
    throw InvalidArgument(
        std::string(name) + " is " +
        (object.is_none() ? "None" : "of type " + nb::cast<std::string>(object.type().attr("__name__"))) +
        ", expected a torch tensor, a NumPy array or anything else with __dlpack__");
  }
  try {
    // Work is queued on the stream that a GPU tensor is used on: its producer need not make another one wait.
    const nb::object device = nb::getattr(object, "__dlpack_device__", nb::none());
    if (!device.is_none() && nb::cast<int>(nb::object(device()[0])) == 2) {
      return method(nb::arg("stream") = -1);
    }
    try {
      return method(nb::arg("max_version") = nb::make_tuple(1, 0));
    } catch (nb::python_error& e) {
      if (!e.matches(PyExc_TypeError)) throw;
      return method();
    }
  } catch (nb::python_error& e) {
    throw InvalidArgument(std::string(name) + " does not export itself through DLPack: " + e.what());
  }
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
  if (view_of_array(object, name, view_)) return;
  capsule_ = export_through_dlpack(object, name);
  // The consumer's part of the protocol (renaming the capsule, calling the deleter) is left to the capsule
  // itself, which does it when it goes away unconsumed.
  if (PyCapsule_IsValid(capsule_.ptr(), "dltensor_versioned")) {
    const auto* managed =
        static_cast<const VersionedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor_versioned"));
    if (managed->version.major != 1) {
      throw InvalidArgument(std::string(name) + " exports DLPack " + std::to_string(managed->version.major) +
                            ", expected version 1 or older");
    }
    view_ = from_dlpack(managed->tensor, name);
  } else if (PyCapsule_IsValid(capsule_.ptr(), "dltensor")) {
    // DLManagedTensor, whose first member is the DLTensor.
    view_ =
        from_dlpack(*static_cast<const DLTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor")), name);
  } else {
    throw InvalidArgument(std::string(name) + " returned no \"dltensor\" capsule from __dlpack__");
  }
}

}  // namespace flash_mla::python
