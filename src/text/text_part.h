#pragma once

#include "flash_mla/chat.h"

namespace flash_mla::text {

using flash_mla::TextPart;

}  // namespace flash_mla::text
