// What the emulated driver asks of the emulated device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "emulate.h"

namespace emulated {

const Kernel *find_kernel(const std::string &name);

// Runs a kernel, whose blocks may start before what was queued before has ended: then memory that kernels
// have written is out of reach until all threads of a block wait for that. False: it failed, and `report`
// says why.
bool run_kernel(const Kernel &kernel, dim3 grid, dim3 block, size_t shared_bytes, const void *arguments,
                std::string &report);

// Writes device memory otherwise than by a kernel: what kernels wrote there before does not count.
void write_memory(void *to, size_t bytes, const std::function<void()> &write);

// Device memory: each allocation has pages of its own, ends where they end, and none of its neighbours
// can be touched. Freed memory stays without access.
void *allocate(size_t bytes);
bool release(void *start, std::string &report);
// A pool gives an allocation of its own out, whose contents are gone then, or takes it back, after which nobody may
// touch it.
bool give(void *start, std::string &report);
bool take_back(void *start, std::string &report);
// Whether `bytes` from `address` lie in one live allocation.
bool is_device_memory(const void *address, size_t bytes);
// What lies at an address, in words.
std::string describe(const void *address);
size_t allocated_bytes();

}  // namespace emulated
