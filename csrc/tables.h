// The tables of the kernels, as soflow/kernels/multi_tensor.py lays them out in device memory.
#pragma once

#include "element.h"

namespace soflow {

constexpr int kChunk = 8192;  // elements
constexpr int kThreads = 256;
constexpr int kMaxAverages = 8;

// One tensor. exp_avg and exp_avg_sq are null until it first has a gradient; shadow is null where there is none.
struct Record {
  float* param;
  float* exp_avg;
  float* exp_avg_sq;
  uint16_t* shadow;
  int64_t numel;
  int64_t group;
};

struct Chunk {
  int32_t tensor;
  int32_t index;
};

struct Counters {
  unsigned long long ticket;  // blocks that are through; 0 between launches
  long long finished;         // updates, skipped ones included
  long long skipped;
  long long skip;  // whether the norm kernel found this update's gradient not finite
};

// norm: of the gradient before clipping. scale: what clipping multiplies it with.
struct Norms {
  float norm;
  float scale;
};

// guard: 1 to skip an update whose gradient is not finite. Read by the norm kernel alone.
struct Policy {
  double clip_norm, guard;
};

struct Tables {
  const Record* records;      // [num_tensors]
  const uint64_t* gradients;  // [num_tensors]: address, 0 for none; bit 0 set for bf16, whose addresses are even
  const uint64_t* averages;   // [num_averages][num_tensors]: address, 0 for none
  const Chunk* chunks;        // [num_chunks]
  float* steps;               // [num_tensors]: updates done
  const Group* groups;
  const Profile* profiles;  // [num_averages]
  const Policy* policy;
  double* partials;  // [num_chunks]: sums of squares
  Counters* counters;
  Norms* norms;
  int64_t num_tensors;
  int64_t num_averages;
  int64_t num_chunks;
};

}  // namespace soflow
