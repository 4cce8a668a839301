// What the emulated driver asks of the emulated device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulate.h"

namespace emulated {

const Kernel *find_kernel(const std::string &name);

// Runs a kernel. False: it failed, and `report` says why.
bool run_kernel(const Kernel &kernel, dim3 grid, dim3 block, size_t shared_bytes, const void *arguments,
                std::string &report);

// Device memory: each allocation has pages of its own, ends where they end, and none of its neighbours
// can be touched. Freed memory stays without access.
void *allocate(size_t bytes);
bool release(void *start, std::string &report);
// Whether `bytes` from `address` lie in one live allocation.
bool is_device_memory(const void *address, size_t bytes);
// What lies at an address, in words.
std::string describe(const void *address);
size_t allocated_bytes();

}  // namespace emulated
