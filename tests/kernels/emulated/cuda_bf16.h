#pragma once
#include "cuda_stand_in.h"
