// Launchers of the kernels.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "multi_tensor.cuh"
#include "multi_tensor.h"

namespace soflow {
namespace {

constexpr int kWords = 480;  // what fits into the 4 KiB of a kernel's arguments

struct Words {
  uint64_t value[kWords];
};

__global__ void write_kernel(uint64_t* to, Words words, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = words.value[i];
}

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::string message = std::string("_soflow_C.") + what + ": " + cudaGetErrorString(status);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver || status == cudaErrorStubLibrary)
    message += "; expected an NVIDIA GPU and a driver for CUDA " + std::to_string(CUDART_VERSION / 1000);
  throw std::runtime_error(message);
}

unsigned grid(const Tables& tables) { return static_cast<unsigned>(std::max<int64_t>(tables.num_chunks, 1)); }

}  // namespace

void launch_norm(const Tables& tables, int device, void* stream) {
  require(cudaSetDevice(device), "norm");
  norm_kernel<<<grid(tables), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(tables);
  require(cudaGetLastError(), "norm");
}

void launch_update(const Tables& tables, bool norm_known, int device, void* stream) {
  require(cudaSetDevice(device), "update");
  update_kernel<<<grid(tables), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(tables, norm_known);
  require(cudaGetLastError(), "update");
}

void launch_write(uint64_t* to, const uint64_t* words, int64_t count, int device, void* stream) {
  require(cudaSetDevice(device), "write");
  for (int64_t first = 0; first < count; first += kWords) {
    Words part{};
    const int size = static_cast<int>(std::min<int64_t>(count - first, kWords));
    std::copy_n(words + first, size, part.value);
    write_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(to + first, part, size);
    require(cudaGetLastError(), "write");
  }
}

}  // namespace soflow
