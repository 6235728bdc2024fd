// The operators ftlab::kth_find, kth_count and kth_write_: what Python calls, over torch's own threads
#include <mutex>
#include "torch.h"
#include "select.h"

using namespace ftlab;

static Select functions(const std::vector<Tensor>& tensors, std::vector<Block>& all) {
  STD_TORCH_CHECK(!tensors.empty(), "no tensors");
  auto type = tensors[0].scalar_type();
  for (auto& t : tensors) {
    STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == type, "kth_magnitude takes contiguous tensors of one type");
    all.push_back({t.data_ptr(), t.numel()});
  }
  return select_of(type_of(tensors[0]), isa());
}

static std::vector<int64_t> numbers(const Tensor& found) {
  STD_TORCH_CHECK(found.numel() == 4 && found.scalar_type() == ScalarType::Long && found.is_contiguous(), "found is four int64 numbers");
  auto* v = (const int64_t*)found.data_ptr();
  return {v, v + 4};
}
static Cut cut_of(const Tensor& found) { auto v = numbers(found); return {(uint32_t)v[0], (uint32_t)v[1], v[2], v[3]}; }

// [low key, high key, how many equal to low are taken, how many equal to high are skipped]
Tensor kth_find(std::vector<Tensor> tensors, int64_t k, int64_t drop) {
  std::vector<Block> all;
  Select f = functions(tensors, all);
  std::mutex lock;
  auto parallel = [&](int64_t n, int64_t grain, auto body) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t a, int64_t b) {
      body(a, b, [&](auto add) { std::lock_guard<std::mutex> hold(lock); add(); });
    });
  };
  Found low = find(all, f, drop + k - 1, parallel), high{0x7fffffffu, 0};
  if (drop) high = find(all, f, drop - 1, parallel);
  Tensor out = torch::stable::new_empty(tensors[0], {4}, ScalarType::Long);
  auto* v = (int64_t*)out.data_ptr();
  v[0] = low.key; v[1] = high.key; v[2] = drop + k - low.above; v[3] = drop - high.above;
  return out;
}

constexpr int64_t PART = 1 << 16;  // a multiple of 8, so that no two parts share a byte of a mask

// Counts of every part of every tensor, turned into what came before each; `first` holds where each tensor's parts begin
static std::vector<Count> before(const std::vector<Block>& all, const Select& f, const Cut& c, std::vector<int64_t>& first) {
  std::vector<Count> n;
  for (auto& t : all) { first.push_back((int64_t)n.size()); n.resize(n.size() + (t.n + PART - 1)/PART); }
  for (size_t j = 0; j < all.size(); j++)
    torch::stable::parallel_for(0, (all[j].n + PART - 1)/PART, 8, [&](int64_t a, int64_t b) {
      for (int64_t i = a; i < b; i++) n[first[j] + i] = f.count(all[j].x, i*PART, std::min(all[j].n, (i + 1)*PART), c);
    });
  first.push_back((int64_t)n.size());
  Count sum{0, 0, 0};
  n.push_back(sum);
  for (auto& o : n) { Count here = o; o = sum; sum.between += here.between; sum.low += here.low; sum.high += here.high; }
  return n;
}
Tensor kth_count(std::vector<Tensor> tensors, Tensor found) {
  std::vector<Block> all;
  std::vector<int64_t> first;
  Select f = functions(tensors, all);
  Cut c = cut_of(found);
  auto n = before(all, f, c, first);
  Tensor out = torch::stable::new_empty(found, {(int64_t)all.size()});
  for (size_t j = 0; j < all.size(); j++) ((int64_t*)out.data_ptr())[j] = chosen_before(n[first[j + 1]], c) - chosen_before(n[first[j]], c);
  return out;
}

void kth_write(std::vector<Tensor> tensors, Tensor found, std::vector<Tensor> out) {
  std::vector<Block> all;
  std::vector<int64_t> first;
  Select f = functions(tensors, all);
  Cut c = cut_of(found);
  auto n = before(all, f, c, first);
  STD_TORCH_CHECK(out.size() == tensors.size(), "one output for each tensor");
  for (size_t j = 0; j < all.size(); j++) {
    bool bits = out[j].scalar_type() == ScalarType::Byte;
    int64_t start = chosen_before(n[first[j]], c), size = chosen_before(n[first[j + 1]], c) - start;
    STD_TORCH_CHECK(out[j].is_contiguous() && (bits ? out[j].numel() == (all[j].n + 7)/8 : out[j].scalar_type() == ScalarType::Int && out[j].numel() == size),
        "an output is a byte for each 8 numbers, or an int32 for each chosen one");
    void* to = out[j].data_ptr();
    torch::stable::parallel_for(0, (all[j].n + PART - 1)/PART, 8, [&](int64_t a, int64_t b) {
      for (int64_t i = a; i < b; i++) {
        Count& o = n[first[j] + i];
        int64_t end = std::min(all[j].n, (i + 1)*PART), at = chosen_before(o, c) - start;
        if (bits) f.mask(all[j].x, i*PART, end, c, {o.low, o.high}, (uint8_t*)to);
        else f.indices(all[j].x, i*PART, end, c, {o.low, o.high}, (int32_t*)to + at);
      }
    });
  }
}

STABLE_TORCH_LIBRARY_IMPL(ftlab, CPU, m) {
  m.impl("kth_find", TORCH_BOX(&kth_find));
  m.impl("kth_count", TORCH_BOX(&kth_count));
  m.impl("kth_write_", TORCH_BOX(&kth_write));
}

#ifdef FTLAB_CUDA
extern "C" int64_t ftlab_kth_work();
extern "C" int ftlab_kth_find(const Parts* all, int batches, int type, int64_t low, int64_t high, void* work, int64_t* found, void* stream);
extern "C" int ftlab_kth_count(const Parts* all, int batches, int type, const int64_t* found, Count* counts, int64_t* out, void* stream);
extern "C" int ftlab_kth_write(const Parts* all, int batches, int type, const int64_t* found, Count* counts, void* const* to, const int64_t* room,
                               void* stream);

// Nothing here waits for the GPU: what is found stays there
static std::vector<Parts> parts_of(const std::vector<Tensor>& tensors) {
  std::vector<Block> all;
  functions(tensors, all);
  return cut_up(all);
}
static Tensor room_for(const Tensor& like, int64_t bytes) { return torch::stable::new_empty(like, {(bytes + 7)/8}, ScalarType::Long); }

Tensor kth_find_cuda(std::vector<Tensor> tensors, int64_t k, int64_t drop) {
  auto all = parts_of(tensors);
  auto device = tensors[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor work = room_for(tensors[0], ftlab_kth_work()), out = room_for(tensors[0], 4*8);
  int error = ftlab_kth_find(all.data(), (int)all.size(), type_of(tensors[0]), drop + k - 1, drop - 1, work.data_ptr(), (int64_t*)out.data_ptr(),
                             stream_of(device));
  STD_TORCH_CHECK(error == 0, "kth_find: CUDA error ", error);
  return out;
}

static const int64_t* on_device(const Tensor& found, const Tensor& like) {
  STD_TORCH_CHECK(found.numel() == 4 && found.scalar_type() == ScalarType::Long && found.is_contiguous() && found.get_device_index() == like.get_device_index(),
      "found is four int64 numbers on the tensors' device");
  return (const int64_t*)found.data_ptr();
}

Tensor kth_count_cuda(std::vector<Tensor> tensors, Tensor found) {
  auto all = parts_of(tensors);
  auto device = tensors[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  auto* f = on_device(found, tensors[0]);
  Tensor counts = room_for(tensors[0], (parts(all) + 1)*(int64_t)sizeof(Count)), out = room_for(tensors[0], 8*(int64_t)tensors.size());
  int error = ftlab_kth_count(all.data(), (int)all.size(), type_of(tensors[0]), f, (Count*)counts.data_ptr(), (int64_t*)out.data_ptr(),
                              stream_of(device));
  STD_TORCH_CHECK(error == 0, "kth_count: CUDA error ", error);
  return out;
}

// How many are chosen is known on the GPU alone, so an output of indices that is too small is filled and no more
void kth_write_cuda(std::vector<Tensor> tensors, Tensor found, std::vector<Tensor> out) {
  auto all = parts_of(tensors);
  auto device = tensors[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  auto* f = on_device(found, tensors[0]);
  STD_TORCH_CHECK(out.size() == tensors.size(), "one output for each tensor");
  std::vector<void*> to;
  std::vector<int64_t> room;
  for (size_t j = 0; j < out.size(); j++) {
    bool bits = out[j].scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(out[j].is_contiguous() && out[j].get_device_index() == device &&
        (bits ? out[j].numel() == (tensors[j].numel() + 7)/8 : out[j].scalar_type() == ScalarType::Int),
        "an output is a byte for each 8 numbers, or an int32 for each chosen one");
    to.push_back(out[j].data_ptr()); room.push_back(bits ? -1 : out[j].numel());
  }
  Tensor counts = room_for(tensors[0], (parts(all) + 1)*(int64_t)sizeof(Count));
  int error = ftlab_kth_write(all.data(), (int)all.size(), type_of(tensors[0]), f, (Count*)counts.data_ptr(), to.data(), room.data(),
                              stream_of(device));
  STD_TORCH_CHECK(error == 0, "kth_write_: CUDA error ", error);
}

STABLE_TORCH_LIBRARY_IMPL(ftlab, CUDA, m) {
  m.impl("kth_find", TORCH_BOX(&kth_find_cuda));
  m.impl("kth_count", TORCH_BOX(&kth_count_cuda));
  m.impl("kth_write_", TORCH_BOX(&kth_write_cuda));
}
#endif
