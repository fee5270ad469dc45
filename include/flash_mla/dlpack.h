#pragma once

#include <dlpack/dlpack.h>

#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// The view a DLTensor describes (byte_offset applied, missing strides filled in as row-major).
/// `name` is used in error messages. Throws InvalidArgument for a dtype, device or rank that the
/// library has no use for, and for extents that do not fit a 64-bit address space.
FLASH_MLA_API TensorView from_dlpack(const DLTensor& tensor, const char* name = "tensor");

/// A DLTensor that describes `view`. Shape and strides are borrowed from it: the DLTensor is valid only as
/// long as the view is.
FLASH_MLA_API DLTensor to_dlpack(TensorView& view);

}  // namespace flash_mla
