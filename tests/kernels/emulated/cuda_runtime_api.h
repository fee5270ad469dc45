#pragma once
// What headers of launches name.
using cudaError_t = int;
using cudaStream_t = void*;
