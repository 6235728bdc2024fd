// The operators ftlab::row_stats and ftlab::row_gradient_: what Python calls for each chunk of logits, rows spread over torch's own threads
#include "torch.h"
#include "crossentropy.h"

using namespace ftlab;
using crossentropy::Rows;
#ifdef FTLAB_CUDA
extern "C" int ftlab_row_stats(const Rows* k, int type, void* stream);
extern "C" int ftlab_row_gradient(const Rows* k, int type, void* stream);
#endif

static void check(const Tensor& t, ScalarType type, int64_t n, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == n, what);
}

static Rows rows_of(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& other, bool reverse) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) > 0, "logits must be contiguous, [rows, words], with at least one word");
  int64_t rows = logits.size(0), n = logits.size(1);
  check(labels, ScalarType::Long, rows, "labels must be int64, one for each row");
  if (other) check(*other, logits.scalar_type(), rows*n, "the reference's logits must have the shape and type of the logits");
  return {logits.data_ptr(), other ? other->data_ptr() : nullptr, (const int64_t*)labels.data_ptr(), nullptr, n, rows, reverse, nullptr, 0};
}
static Rows for_gradient(const Tensor& logits, const Tensor& labels, const Tensor& stats, const Tensor& weight,
                         const std::optional<Tensor>& other, double kl, bool reverse) {
  Rows k = rows_of(logits, labels, other, reverse);
  check(stats, ScalarType::Float, (other ? 7 : 4)*k.rows, "stats must be what row_stats returned for these rows");
  check(weight, ScalarType::Float, k.rows, "weight must be float32, one for each row");
  k.out = (float*)stats.data_ptr(); k.weight = (const float*)weight.data_ptr(); k.kl = (float)kl;
  return k;
}

static void run(const Rows& k, bool slopes, int type) {
  if (!slopes) for (int64_t i = 0; i < k.rows; i++) STD_TORCH_CHECK(k.labels[i] >= 0 && k.labels[i] < k.n, "a label is not a word of the head");
  auto f = crossentropy::run_of(slopes, type, isa());
  torch::stable::parallel_for(0, k.rows, 1 + 32768/k.n, [&](int64_t a, int64_t b) { f(k, a, b); });
}

Tensor row_stats_cpu(Tensor logits, Tensor labels, std::optional<Tensor> other, bool reverse) {
  Rows k = rows_of(logits, labels, other, reverse);
  Tensor out = torch::stable::new_empty(logits, {other ? 7 : 4, k.rows}, ScalarType::Float);
  k.out = (float*)out.data_ptr();
  run(k, false, type_of(logits));
  return out;
}
void row_gradient_cpu(Tensor logits, Tensor labels, Tensor stats, Tensor weight, std::optional<Tensor> other, double kl, bool reverse) {
  run(for_gradient(logits, labels, stats, weight, other, kl, reverse), true, type_of(logits));
}
STABLE_TORCH_LIBRARY_IMPL(ftlab, CPU, m) {
  m.impl("row_stats", TORCH_BOX(&row_stats_cpu));
  m.impl("row_gradient_", TORCH_BOX(&row_gradient_cpu));
}

#ifdef FTLAB_CUDA
Tensor row_stats_cuda(Tensor logits, Tensor labels, std::optional<Tensor> other, bool reverse) {
  Rows k = rows_of(logits, labels, other, reverse);
  auto device = logits.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = torch::stable::new_empty(logits, {other ? 7 : 4, k.rows}, ScalarType::Float);
  k.out = (float*)out.data_ptr();
  int error = ftlab_row_stats(&k, type_of(logits), stream_of(device));
  STD_TORCH_CHECK(error == 0, "row_stats: CUDA error ", error);
  return out;
}
void row_gradient_cuda(Tensor logits, Tensor labels, Tensor stats, Tensor weight, std::optional<Tensor> other, double kl, bool reverse) {
  Rows k = for_gradient(logits, labels, stats, weight, other, kl, reverse);
  auto device = logits.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  int error = ftlab_row_gradient(&k, type_of(logits), stream_of(device));
  STD_TORCH_CHECK(error == 0, "row_gradient_: CUDA error ", error);
}
STABLE_TORCH_LIBRARY_IMPL(ftlab, CUDA, m) {
  m.impl("row_stats", TORCH_BOX(&row_stats_cuda));
  m.impl("row_gradient_", TORCH_BOX(&row_gradient_cuda));
}
#endif
