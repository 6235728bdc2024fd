// The operator ftlab::perturb_: checks, then tiles spread over torch's own threads. Bound by torch's stable interface, so that it
// compiles in seconds and a build outlives a minor version of torch. Python declares the schema (nbs/native/perturb.ipynb).
#include "torch.h"
#include "perturb.h"

using ftlab::type_of;
#ifdef FTLAB_CUDA
extern "C" int ftlab_perturb(void* p, void* low, int64_t n, int kind, int type, uint64_t seed, uint64_t tensor, float scale, float decay, void* stream);
#endif

// `low` holds no tensor, or one int16 tensor for each of `tensors`, which then are bfloat16
static int16_t* lower(const std::vector<Tensor>& tensors, const std::vector<Tensor>& low, size_t i) {
  STD_TORCH_CHECK(tensors[i].is_contiguous(), "perturb_ takes contiguous tensors");
  if (low.empty()) return nullptr;
  STD_TORCH_CHECK(low.size() == tensors.size() && low[i].is_contiguous() && low[i].numel() == tensors[i].numel() &&
      low[i].scalar_type() == ScalarType::Short && type_of(tensors[i]) == ftlab::TYPE_BF16, "low is one int16 tensor for each bfloat16 tensor");
  return (int16_t*)low[i].data_ptr();
}

void perturb_cpu(std::vector<Tensor> tensors, std::vector<Tensor> low, int64_t seed, double scale, double decay, bool signs, int64_t first) {
  for (size_t i = 0; i < tensors.size(); i++) {
    void* p = tensors[i].data_ptr();
    int16_t* rest = lower(tensors, low, i);
    int64_t n = tensors[i].numel();
    ftlab::Move move{(uint64_t)seed, (uint64_t)(first + (int64_t)i), (float)scale, (float)decay};
    ftlab::Range run = ftlab::range_of(signs, type_of(tensors[i]), ftlab::isa());
    int64_t grain = signs ? 16 : 512;  // 64 thousand numbers: what is smaller is done before a second thread would have woken
    torch::stable::parallel_for(0, ftlab::tiles(n, signs), grain, [=](int64_t a, int64_t b) { run(p, rest, n, a, b, move); });
  }
}
STABLE_TORCH_LIBRARY_IMPL(ftlab, CPU, m) { m.impl("perturb_", TORCH_BOX(&perturb_cpu)); }

#ifdef FTLAB_CUDA
void perturb_cuda(std::vector<Tensor> tensors, std::vector<Tensor> low, int64_t seed, double scale, double decay, bool signs, int64_t first) {
  for (size_t i = 0; i < tensors.size(); i++) {
    auto device = tensors[i].get_device_index();
    torch::stable::accelerator::DeviceGuard guard(device);
    int error = ftlab_perturb(tensors[i].data_ptr(), lower(tensors, low, i), tensors[i].numel(), signs, type_of(tensors[i]),
                              (uint64_t)seed, (uint64_t)(first + (int64_t)i), (float)scale, (float)decay, ftlab::stream_of(device));
    STD_TORCH_CHECK(error == 0, "perturb_: CUDA error ", error);
  }
}
STABLE_TORCH_LIBRARY_IMPL(ftlab, CUDA, m) { m.impl("perturb_", TORCH_BOX(&perturb_cuda)); }
#endif
