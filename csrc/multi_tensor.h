// Launchers. Each returns at once and throws std::runtime_error where CUDA refuses; nothing else is checked here.
#pragma once

#include "tables.h"

namespace soflow {

void launch_norm(const Tables& tables, int device, void* stream);
void launch_update(const Tables& tables, bool norm_known, int device, void* stream);

// Puts `words`, which are arguments of the kernel and thus part of a captured graph, at `to`.
void launch_write(uint64_t* to, const uint64_t* words, int64_t count, int device, void* stream);

}  // namespace soflow
