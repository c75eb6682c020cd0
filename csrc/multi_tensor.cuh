// The kernels: one block per chunk of a tensor, whatever the number and size of tensors.
//
// Everything they read and write lies in device memory, so that a captured graph may be replayed on other values. The
// last block to finish, by a ticket, sums the partial norms in the order of the chunks and does the bookkeeping;
// nothing else is atomic, so that the same input gives the same bits.
#pragma once

#include "element.h"
#include "tables.h"

namespace soflow {

// Aligned as a whole: one load or store.
template <typename T, int W>
struct alignas(sizeof(T) * W) Pack {
  T x[W];
};

struct Gradient {
  const void* data;
  bool is_bf16;
  bool is_aligned;  // for a pack of four

  __device__ explicit Gradient(uint64_t tagged)
      : data(reinterpret_cast<const void*>(tagged & ~uint64_t{1})),
        is_bf16((tagged & 1) != 0),
        is_aligned((tagged & ~uint64_t{1}) % (is_bf16 ? 8 : 16) == 0) {}

  template <int W>
  __device__ Pack<float, W> load(int64_t i) const {
    Pack<float, W> g;
    if (is_bf16) {
      const uint16_t* from = static_cast<const uint16_t*>(data) + i;
      Pack<uint16_t, W> bits;
      if (is_aligned) {
        bits = *reinterpret_cast<const Pack<uint16_t, W>*>(from);
      } else {
#pragma unroll
        for (int k = 0; k < W; ++k) bits.x[k] = from[k];
      }
#pragma unroll
      for (int k = 0; k < W; ++k) g.x[k] = from_bf16(bits.x[k]);
    } else {
      const float* from = static_cast<const float*>(data) + i;
      if (is_aligned) {
        g = *reinterpret_cast<const Pack<float, W>*>(from);
      } else {
#pragma unroll
        for (int k = 0; k < W; ++k) g.x[k] = from[k];
      }
    }
    return g;
  }
};

// An average that moves in this update.
struct Moving {
  float* data;
  double decay;
  bool in_double;
};

// What a block knows of its tensor, in shared memory.
struct Work {
  Record record;
  Coefficients coefficients;
  float scale;
  int num_moving;
  Moving moving[kMaxAverages];
};

template <int W>
__device__ Pack<float, W> load(const float* from, int64_t i) {
  return *reinterpret_cast<const Pack<float, W>*>(from + i);
}

// By the instruction, for what is written once and not read soon: of an assignment nvcc makes a store per element.
template <int W>
__device__ void store(float* to, int64_t i, const Pack<float, W>& value) {
  if constexpr (W == 4) {
    __stcs(reinterpret_cast<float4*>(to + i), make_float4(value.x[0], value.x[1], value.x[2], value.x[3]));
  } else {
    to[i] = value.x[0];
  }
}

template <int W>
__device__ void store(uint16_t* to, int64_t i, const Pack<uint16_t, W>& value) {
  if constexpr (W == 4) {
    __stcs(reinterpret_cast<ushort4*>(to + i), make_ushort4(value.x[0], value.x[1], value.x[2], value.x[3]));
  } else {
    to[i] = value.x[0];
  }
}

template <int W>
__device__ double sum_squares(const Pack<float, W>& g) {
  double sum = 0.0;
#pragma unroll
  for (int k = 0; k < W; ++k) sum += static_cast<double>(g.x[k]) * g.x[k];
  return sum;
}

template <int W>
__device__ void move(const Moving& average, int64_t i, Pack<float, W> value, const Pack<float, W>& w) {
#pragma unroll
  for (int k = 0; k < W; ++k) value.x[k] = average_element(average.decay, average.in_double, value.x[k], w.x[k]);
  store<W>(average.data, i, value);
}

// Sum over the block, in a fixed order; every thread returns it.
__device__ inline double block_sum(double value, double* shared) {
  __syncthreads();
  shared[threadIdx.x] = value;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  return shared[0];
}

// Whether this block is the last of the grid to come here: it sees what the others wrote before.
__device__ inline bool is_last_block(Counters* counters) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&counters->ticket, 1ull) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

__device__ inline double ordered_sum(const Tables& t, double* shared) {
  const volatile double* partials = t.partials;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < t.num_chunks; i += kThreads) sum += partials[i];
  return block_sum(sum, shared);
}

template <int W>
__device__ double sum_range(const Gradient& gradient, int64_t begin, int64_t end) {
  double sum = 0.0;
  for (int64_t i = begin + threadIdx.x * W; i < end; i += kThreads * W) sum += sum_squares<W>(gradient.load<W>(i));
  return sum;
}

// Norm of all gradients, the factor of clipping, and whether to skip the update.
__global__ void __launch_bounds__(kThreads) norm_kernel(Tables t) {
  __shared__ double shared[kThreads];
  if (blockIdx.x < t.num_chunks) {
    const Chunk chunk = t.chunks[blockIdx.x];
    const uint64_t tagged = t.gradients[chunk.tensor];
    double sum = 0.0;
    if (tagged != 0) {
      const Gradient gradient(tagged);
      const int64_t begin = static_cast<int64_t>(chunk.index) * kChunk;
      const int64_t rest = t.records[chunk.tensor].numel - begin;
      const int64_t end = begin + (rest < kChunk ? rest : kChunk);
      const int64_t packed = gradient.is_aligned ? end - end % 4 : begin;
      sum = sum_range<4>(gradient, begin, packed) + sum_range<1>(gradient, packed, end);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) t.partials[blockIdx.x] = sum;
  }
  if (is_last_block(t.counters)) {
    const double total = ordered_sum(t, shared);
    if (threadIdx.x == 0) {
      const double norm = sqrt(total);
      t.norms->norm = static_cast<float>(norm);
      t.norms->scale = clip_scale(t.policy->clip_norm, norm);
      t.counters->skip = t.policy->guard != 0.0 && !(norm <= 1.7976931348623157e308);
      t.counters->ticket = 0;
    }
  }
}

// Returns the thread's part of the sum of squares of the gradient as it was before clipping.
template <int W>
__device__ double update_range(const Work& work, uint64_t tagged, int64_t begin, int64_t end) {
  const Gradient gradient(tagged);
  const Record& record = work.record;
  double sum = 0.0;
  for (int64_t i = begin + threadIdx.x * W; i < end; i += kThreads * W) {
    Pack<float, W> w = load<W>(record.param, i);
    Pack<float, W> average;
    // most models have one: its load is under way together with the others
    if (work.num_moving > 0) average = load<W>(work.moving[0].data, i);
    if (tagged != 0) {
      const Pack<float, W> g = gradient.load<W>(i);
      Pack<float, W> m = load<W>(record.exp_avg, i);
      Pack<float, W> v = load<W>(record.exp_avg_sq, i);
      sum += sum_squares<W>(g);
#pragma unroll
      for (int k = 0; k < W; ++k) update_element(work.coefficients, work.scale * g.x[k], w.x[k], m.x[k], v.x[k]);
      store<W>(record.param, i, w);
      store<W>(record.exp_avg, i, m);
      store<W>(record.exp_avg_sq, i, v);
      if (record.shadow != nullptr) {
        Pack<uint16_t, W> bits;
#pragma unroll
        for (int k = 0; k < W; ++k) bits.x[k] = to_bf16(w.x[k]);
        store<W>(record.shadow, i, bits);
      }
    }
    if (work.num_moving > 0) move<W>(work.moving[0], i, average, w);
    for (int a = 1; a < work.num_moving; ++a) move<W>(work.moving[a], i, load<W>(work.moving[a].data, i), w);
  }
  return sum;
}

// Weights, moments, averages and shadows of every tensor; the norm as well, unless the norm kernel ran before.
__global__ void __launch_bounds__(kThreads) update_kernel(Tables t, bool norm_known) {
  __shared__ double shared[kThreads];
  __shared__ Work work;
  const bool skip = norm_known && t.counters->skip != 0;
  const long long finished = t.counters->finished;
  if (blockIdx.x < t.num_chunks && !skip) {
    const Chunk chunk = t.chunks[blockIdx.x];
    const uint64_t tagged = t.gradients[chunk.tensor];
    if (threadIdx.x == 0) {
      work.record = t.records[chunk.tensor];
      work.coefficients = coefficients(t.groups[work.record.group], t.steps[chunk.tensor] + 1.0);
      work.scale = norm_known ? t.norms->scale : 1.0f;
      work.num_moving = 0;
      for (int a = 0; a < t.num_averages; ++a) {
        const uint64_t address = t.averages[a * t.num_tensors + chunk.tensor];
        const double decay = decay_at(t.profiles[a], finished);
        if (address != 0 && decay >= 0.0)
          work.moving[work.num_moving++] = {reinterpret_cast<float*>(address), decay, t.profiles[a].in_double != 0.0};
      }
    }
    __syncthreads();
    uint64_t addresses = reinterpret_cast<uint64_t>(work.record.param);
    if (tagged != 0)
      addresses |= reinterpret_cast<uint64_t>(work.record.exp_avg) |
                   reinterpret_cast<uint64_t>(work.record.exp_avg_sq) |
                   reinterpret_cast<uint64_t>(work.record.shadow) << 1;
    for (int a = 0; a < work.num_moving; ++a) addresses |= reinterpret_cast<uint64_t>(work.moving[a].data);
    const int64_t begin = static_cast<int64_t>(chunk.index) * kChunk;
    const int64_t rest = work.record.numel - begin;
    const int64_t end = begin + (rest < kChunk ? rest : kChunk);
    const int64_t packed = addresses % 16 == 0 ? end - end % 4 : begin;
    double sum = update_range<4>(work, tagged, begin, packed) + update_range<1>(work, tagged, packed, end);
    if (!norm_known) {
      sum = block_sum(sum, shared);
      if (threadIdx.x == 0) t.partials[blockIdx.x] = sum;
    }
  }
  if (is_last_block(t.counters)) {
    const double total = norm_known ? 0.0 : ordered_sum(t, shared);
    if (!skip) {
      for (int64_t i = threadIdx.x; i < t.num_tensors; i += kThreads) t.steps[i] += t.gradients[i] != 0 ? 1.0f : 0.0f;
    }
    if (threadIdx.x == 0) {
      if (!norm_known) t.norms->norm = static_cast<float>(sqrt(total));
      t.counters->finished = finished + 1;
      t.counters->skipped += skip ? 1 : 0;
      t.counters->ticket = 0;
    }
  }
}

}  // namespace soflow
