// The operators ftlab::sparse_adamw_ and ftlab::gather_: checks, then all tensors together spread over torch's own threads
#include "torch.h"
#include "adamw.h"

using namespace ftlab::adamw;
using ftlab::type_of;
typedef std::vector<Tensor> Tensors;
typedef std::vector<int64_t> Ints;
typedef std::vector<double> Floats;

static bool is(const Tensor& t, ScalarType type, int64_t size) { return t.is_contiguous() && t.scalar_type() == type && t.numel() == size; }

// What tensor i's list says, held against the sizes of what it is about: the tensor's numbers, and the chosen ones
static Chosen chosen_of(const Tensor& at, const Tensor& before, int64_t length, int64_t stride, int64_t numbers, int64_t listed) {
  if (at.scalar_type() == ScalarType::Byte) {
    STD_TORCH_CHECK(is(at, ScalarType::Byte, (numbers + 7)/8) && is(before, ScalarType::Long, (numbers + BLOCK - 1)/BLOCK),
        "a mask is a byte for each 8 numbers, with a count before each ", BLOCK);
    return {nullptr, (const uint8_t*)at.data_ptr(), (const int64_t*)before.data_ptr(), numbers, 0, 0, 0};
  }
  int64_t per = at.numel()*length;
  STD_TORCH_CHECK(is(at, ScalarType::Int, at.numel()) && length > 0 && stride >= 0 && (per ? listed % per == 0 : listed == 0),
      "places are int32, and the list is as long as their runs, or some times that");
  return {(const int32_t*)at.data_ptr(), nullptr, nullptr, listed, at.numel(), length, stride};
}

static std::vector<Job> steps_of(const Tensors& tensors, const Tensors& first, const Tensors& second, const Tensors& grads, const Tensors& at,
    const Tensors& before, const Ints& lengths, const Ints& strides, const Floats& rates, const Floats& roots, double beta1, double beta2,
    double eps, double decay, bool dense) {
  std::vector<Job> jobs;
  size_t many = tensors.size();
  STD_TORCH_CHECK(first.size() == many && second.size() == many && grads.size() == many && at.size() == many && before.size() == many &&
      lengths.size() == many && strides.size() == many && rates.size() == many && roots.size() == many, "one of each for each tensor");
  for (size_t i = 0; i < many; i++) {
    int64_t n = tensors[i].numel(), k = first[i].numel();
    STD_TORCH_CHECK(tensors[i].is_contiguous() && is(first[i], ScalarType::Float, k) && is(second[i], ScalarType::Float, k),
        "sparse_adamw_ takes contiguous tensors, and moments in float32 of one size");
    STD_TORCH_CHECK(dense ? is(grads[i], tensors[i].scalar_type(), n) : is(grads[i], ScalarType::Float, k),
        "a dense gradient is like its tensor; one of the chosen numbers is float32, and like the moments");
    jobs.push_back({chosen_of(at[i], before[i], lengths[i], strides[i], n, k), tensors[i].data_ptr(), grads[i].data_ptr(),
        (float*)first[i].data_ptr(), (float*)second[i].data_ptr(),
        {(float)rates[i], (float)roots[i], (float)(1 - beta1), (float)beta2, (float)(1 - beta2), (float)eps, (float)decay}});
  }
  return jobs;
}
static std::vector<Job> gathers_of(const Tensors& out, const Tensors& dense, const Tensors& at, const Tensors& before, const Ints& lengths,
    const Ints& strides) {
  std::vector<Job> jobs;
  size_t many = out.size();
  STD_TORCH_CHECK(dense.size() == many && at.size() == many && before.size() == many && lengths.size() == many && strides.size() == many,
      "one of each for each tensor");
  for (size_t i = 0; i < many; i++) {
    STD_TORCH_CHECK(dense[i].is_contiguous() && is(out[i], ScalarType::Float, out[i].numel()), "gather_ takes contiguous gradients, and float32 lists");
    jobs.push_back({chosen_of(at[i], before[i], lengths[i], strides[i], dense[i].numel(), out[i].numel()), dense[i].data_ptr(), nullptr,
        (float*)out[i].data_ptr(), nullptr, {}});
  }
  return jobs;
}

// All tensors in one line, cut into as many parts as there are threads: a part may end within a tensor, or hold a hundred small ones
static void spread(const std::vector<Job>& jobs, const std::vector<Loop>& loops) {
  std::vector<int64_t> first{0};
  for (auto& j : jobs) first.push_back(first.back() + units(j.chosen)*(j.chosen.bits ? BLOCK : 1));
  torch::stable::parallel_for(0, first.back(), 1 << 16, [&](int64_t a, int64_t b) {
    for (size_t i = 0; i < jobs.size(); i++) {
      int64_t unit = jobs[i].chosen.bits ? BLOCK : 1, from = std::max(a, first[i]) - first[i], to = std::min(b, first[i + 1]) - first[i];
      if (from < to) loops[i](jobs[i], (from + unit - 1)/unit, (to + unit - 1)/unit);  // a block belongs to the part that holds its beginning
    }
  });
}

void sparse_adamw_cpu(Tensors tensors, Tensors first, Tensors second, Tensors grads, Tensors at, Tensors before, Ints lengths, Ints strides,
    Floats rates, Floats roots, double beta1, double beta2, double eps, double decay, bool dense) {
  std::vector<Loop> loops;
  for (auto& t : tensors) loops.push_back(step_of(type_of(t), dense, ftlab::isa()));
  spread(steps_of(tensors, first, second, grads, at, before, lengths, strides, rates, roots, beta1, beta2, eps, decay, dense), loops);
}
void gather_cpu(Tensors out, Tensors dense, Tensors at, Tensors before, Ints lengths, Ints strides, bool add) {
  std::vector<Loop> loops;
  for (auto& t : dense) loops.push_back(gather_of(type_of(t), add, ftlab::isa()));
  spread(gathers_of(out, dense, at, before, lengths, strides), loops);
}
STABLE_TORCH_LIBRARY_IMPL(ftlab, CPU, m) {
  m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_cpu));
  m.impl("gather_", TORCH_BOX(&gather_cpu));
}

#ifdef FTLAB_CUDA
extern "C" int ftlab_adamw(const ftlab::adamw::Table* table, int type, int what, void* stream);

// Up to ITEMS tensors of one type a launch: their addresses travel with the call, as its arguments
static void launch(const std::vector<Job>& jobs, const Tensors& like, int what) {
  if (jobs.empty()) return;
  auto device = like[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  for (int type = 0; type < 3; type++) {
    Table table{};
    for (size_t i = 0; i <= jobs.size(); i++) {
      if (i < jobs.size() && type_of(like[i]) == type && jobs[i].chosen.count) table.add(jobs[i]);
      if (!table.n || (table.n < ITEMS && i < jobs.size())) continue;
      int error = ftlab_adamw(&table, type, what, ftlab::stream_of(device));
      STD_TORCH_CHECK(error == 0, "sparse_adamw_: CUDA error ", error);
      table = Table{};
    }
  }
}
void sparse_adamw_cuda(Tensors tensors, Tensors first, Tensors second, Tensors grads, Tensors at, Tensors before, Ints lengths, Ints strides,
    Floats rates, Floats roots, double beta1, double beta2, double eps, double decay, bool dense) {
  launch(steps_of(tensors, first, second, grads, at, before, lengths, strides, rates, roots, beta1, beta2, eps, decay, dense), tensors, dense ? DENSE : LISTED);
}
void gather_cuda(Tensors out, Tensors dense, Tensors at, Tensors before, Ints lengths, Ints strides, bool add) {
  launch(gathers_of(out, dense, at, before, lengths, strides), dense, add ? ADD : LIST);
}
STABLE_TORCH_LIBRARY_IMPL(ftlab, CUDA, m) {
  m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_cuda));
  m.impl("gather_", TORCH_BOX(&gather_cuda));
}
#endif
