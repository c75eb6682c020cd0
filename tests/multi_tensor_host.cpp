// Runs the kernels of csrc/multi_tensor.cuh on the CPU: a thread per thread of a block, one block after the other, the
// last ones first. For tests without a GPU; the kernels are included as they are.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

struct Index {
  unsigned x;
};
static thread_local Index threadIdx;
static Index blockIdx, gridDim;
static std::barrier<>* block_barrier;

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

static void __syncthreads() { block_barrier->arrive_and_wait(); }
static void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) ushort4 {
  unsigned short x, y, z, w;
};
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) {
  return {x, y, z, w};
}

// Accesses at an address that their type does not allow, which a GPU would refuse: what -fsanitize=alignment finds, to
// which this is the handler in place of one that prints, and __stcs.
static std::atomic<long long> misaligned_accesses;
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { ++misaligned_accesses; }

// as words: what lies there has another type
template <typename T>
static void __stcs(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % alignof(T) != 0) ++misaligned_accesses;
  __builtin_memcpy(to, &value, sizeof(T));
}

#include "multi_tensor.cuh"

namespace {

void launch(const soflow::Tables& tables, const std::function<void()>& kernel) {
  gridDim.x = static_cast<unsigned>(std::max<int64_t>(tables.num_chunks, 1));
  std::barrier<> barrier(soflow::kThreads);
  block_barrier = &barrier;
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < soflow::kThreads; ++thread)
    threads.emplace_back([&, thread] {
      threadIdx.x = thread;
      for (unsigned block = gridDim.x; block-- > 0;) {
        if (thread == 0) blockIdx.x = block;
        barrier.arrive_and_wait();
        kernel();
        barrier.arrive_and_wait();
      }
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

extern "C" {

extern const int64_t kSizes[];
const int64_t kSizes[] = {soflow::kChunk, soflow::kMaxAverages};

long long misaligned() { return misaligned_accesses; }

void norm(const soflow::Tables* tables) {
  launch(*tables, [&] { soflow::norm_kernel(*tables); });
}

void update(const soflow::Tables* tables, bool norm_known) {
  launch(*tables, [&] { soflow::update_kernel(*tables, norm_known); });
}

void update_element(const soflow::Group* group, double step, float g, float* w, float* m, float* v) {
  soflow::update_element(soflow::coefficients(*group, step), g, *w, *m, *v);
}

void average(double decay, bool in_double, float* average, const float* weights, int64_t count) {
  for (int64_t i = 0; i < count; ++i) *average = soflow::average_element(decay, in_double, *average, weights[i]);
}

void to_bf16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = soflow::to_bf16(from[i]);
}

void from_bf16(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = soflow::from_bf16(from[i]);
}
}
