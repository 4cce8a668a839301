// Everything emulated in one unit: the device, the driver, and the kernels as the host compiler sees them.
#include "memory.cpp"
#include "device.cpp"
#include "driver.cpp"
#include "inspect.cpp"

#include "broken.cu"

#include "../kernels/attention.cu"
#include "../kernels/gemm.cu"
#include "../kernels/linear.cu"
#include "../kernels/prefill.cu"
#include "../kernels/rope.cu"
#include "../kernels/rows.cu"
#include "../kernels/sample.cu"
