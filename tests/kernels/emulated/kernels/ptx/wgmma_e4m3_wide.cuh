#pragma once
#include "kernels/ptx/wgmma_e4m3.cuh"
