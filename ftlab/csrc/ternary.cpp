// The operators ftlab::add_ternary_ and ftlab::pack_signs_: checks, then tiles spread over torch's own threads (nbs/native/ternary.ipynb)
#include "torch.h"
#include "ternary.h"

using namespace ftlab;
#ifdef FTLAB_CUDA
extern "C" int ftlab_add_ternary(void* w, int64_t n, int type, const ternary::Sum* v, void* stream);
extern "C" int ftlab_pack_signs(const void* x, int64_t n, int type, uint8_t* positive, uint8_t* negative, void* stream);
#endif

static uint8_t* plane(const Tensor& p, const Tensor& of) {
  STD_TORCH_CHECK(p.is_contiguous() && p.scalar_type() == ScalarType::Byte && p.numel() == (of.numel() + 7)/8 && p.get_device_index() == of.get_device_index(),
      "a plane is a contiguous uint8 tensor with a bit for each number, on the device of its tensor");
  return (uint8_t*)p.data_ptr();
}

// The vectors of tensor i: as many as there are scales for each tensor, one tensor's after another's
static ternary::Sum vectors(const std::vector<Tensor>& tensors, size_t i, const std::vector<Tensor>& positive, const std::vector<Tensor>& negative,
                            const std::vector<double>& scales) {
  size_t each = scales.size()/tensors.size();
  STD_TORCH_CHECK(tensors[i].is_contiguous() && each <= ternary::MOST && positive.size() == scales.size() && negative.size() == scales.size() &&
      each*tensors.size() == scales.size(), "add_ternary_ takes contiguous tensors, and for each as many vectors, at most 128");
  ternary::Sum v{};
  v.count = (int64_t)each;
  for (size_t j = 0; j < each; j++) {
    v.positive[j] = plane(positive[i*each + j], tensors[i]); v.negative[j] = plane(negative[i*each + j], tensors[i]);
    v.scale[j] = (float)scales[i*each + j];
  }
  return v;
}

void add_ternary_cpu(std::vector<Tensor> tensors, std::vector<Tensor> positive, std::vector<Tensor> negative, std::vector<double> scales) {
  for (size_t i = 0; i < tensors.size(); i++) {
    ternary::Sum v = vectors(tensors, i, positive, negative, scales);
    ternary::Add add = ternary::add_of(type_of(tensors[i]), isa());
    void* w = tensors[i].data_ptr();
    int64_t n = tensors[i].numel();
    torch::stable::parallel_for(0, ternary::tiles(n), 256, [&](int64_t a, int64_t b) { add(w, n, a, b, v); });
  }
}

void pack_signs_cpu(Tensor x, Tensor positive, Tensor negative) {
  STD_TORCH_CHECK(x.is_contiguous(), "pack_signs_ takes a contiguous tensor");
  uint8_t *p = plane(positive, x), *m = plane(negative, x);
  ternary::Pack pack = ternary::pack_of(type_of(x), isa());
  int64_t n = x.numel();
  torch::stable::parallel_for(0, (n + STRIP - 1)/STRIP, 1024, [&](int64_t a, int64_t b) { pack(x.data_ptr(), n, a, b, p, m); });
}
STABLE_TORCH_LIBRARY_IMPL(ftlab, CPU, m) { m.impl("add_ternary_", TORCH_BOX(&add_ternary_cpu)); m.impl("pack_signs_", TORCH_BOX(&pack_signs_cpu)); }

#ifdef FTLAB_CUDA
void add_ternary_cuda(std::vector<Tensor> tensors, std::vector<Tensor> positive, std::vector<Tensor> negative, std::vector<double> scales) {
  for (size_t i = 0; i < tensors.size(); i++) {
    ternary::Sum v = vectors(tensors, i, positive, negative, scales);
    auto device = tensors[i].get_device_index();
    torch::stable::accelerator::DeviceGuard guard(device);
    int error = ftlab_add_ternary(tensors[i].data_ptr(), tensors[i].numel(), type_of(tensors[i]), &v, stream_of(device));
    STD_TORCH_CHECK(error == 0, "add_ternary_: CUDA error ", error);
  }
}
void pack_signs_cuda(Tensor x, Tensor positive, Tensor negative) {
  STD_TORCH_CHECK(x.is_contiguous(), "pack_signs_ takes a contiguous tensor");
  auto device = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  int error = ftlab_pack_signs(x.data_ptr(), x.numel(), type_of(x), plane(positive, x), plane(negative, x), stream_of(device));
  STD_TORCH_CHECK(error == 0, "pack_signs_: CUDA error ", error);
}
STABLE_TORCH_LIBRARY_IMPL(ftlab, CUDA, m) { m.impl("add_ternary_", TORCH_BOX(&add_ternary_cuda)); m.impl("pack_signs_", TORCH_BOX(&pack_signs_cuda)); }
#endif
