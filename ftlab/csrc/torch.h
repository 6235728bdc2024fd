// What the operators share: torch's stable interface, a tensor's type, and on a GPU the stream that torch is using
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <vector>
#ifdef FTLAB_CUDA
#include <torch/csrc/stable/accelerator.h>
#if defined(TORCH_VERSION_2_13_0)  // older headers do not know the name, and would take it for 0
#define FTLAB_ASKS_STREAM (TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0)
#else
#define FTLAB_ASKS_STREAM 0
#endif
#if !FTLAB_ASKS_STREAM
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);  // what there was before Stream::nativeHandle
#endif
#endif
#include "common.h"

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

namespace ftlab {

inline int type_of(const Tensor& p) {
  switch (p.scalar_type()) {
    case ScalarType::Float: return TYPE_F32;
    case ScalarType::BFloat16: return TYPE_BF16;
    case ScalarType::Half: return TYPE_F16;
    default: STD_TORCH_CHECK(false, "takes float32, bfloat16 and float16");
  }
}

#ifdef FTLAB_CUDA
inline void* stream_of(int32_t device) {
#if FTLAB_ASKS_STREAM
  return torch::stable::accelerator::getCurrentStream(device).nativeHandle();
#else
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no CUDA stream");
  return stream;
#endif
}
#endif

}  // namespace ftlab
