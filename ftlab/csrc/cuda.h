// What the .cu files share: the CUDA runtime, and one way to start a kernel, so that a stand-in for both (tests/native/cuda_shim.h)
// can run the kernels on a processor. The stand-in is included first and defines the macro.
#pragma once
#ifndef FTLAB_LAUNCH
#include <cuda_runtime.h>
#define FTLAB_LAUNCH(kernel, grid, block, stream, ...) kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#endif
