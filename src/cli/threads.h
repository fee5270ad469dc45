#pragma once

#include "base/processors.h"

namespace flash_mla::cli {

/// libgomp reads its environment once, when it is loaded, which is before main. So the program sets there what
/// choose_threading says, wherever the user has not, and starts itself again, once. To be called first in main;
/// it goes on as it is where that cannot be done.
void start_with_chosen_threads(char** argv);

/// What was chosen.
const Threading& chosen_threads();

}  // namespace flash_mla::cli
