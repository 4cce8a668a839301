// Kernels with one fault each, which the emulator must report. Run in two blocks of 64 threads.
#include "../kernels/common.cuh"

struct BrokenArgs {
    float *data;   // [64]
    float *freed;  // [64], given back
};

constexpr int BROKEN_THREADS = 64;
#define BROKEN_KERNEL(name) KERNEL(broken_##name, BrokenArgs, BROKEN_THREADS)

BROKEN_KERNEL(nowhere) {
    SHARED(float, shared, BROKEN_THREADS);
    shared[threadIdx.x] = args.data[threadIdx.x];
    __syncthreads();
    args.data[threadIdx.x] = shared[(threadIdx.x + 1) % BROKEN_THREADS];
}
BROKEN_KERNEL(read_past_the_end) { args.data[threadIdx.x] = args.data[threadIdx.x + 1]; }
BROKEN_KERNEL(write_before_the_start) { args.data[int(threadIdx.x) - 1025] = 0.0f; }
BROKEN_KERNEL(use_after_free) { args.data[threadIdx.x] = args.freed[threadIdx.x]; }
BROKEN_KERNEL(barrier_of_some) {
    if (threadIdx.x < WARP) __syncthreads();
}
BROKEN_KERNEL(shuffle_of_some) {
    if (threadIdx.x % 2) args.data[threadIdx.x] = __shfl_sync(ALL_LANES, 1.0f, 0);
}
BROKEN_KERNEL(different_operations) {
    const int lane = threadIdx.x % WARP;
    args.data[threadIdx.x] = lane ? __shfl_sync(ALL_LANES, 1.0f, 0) : float(__shfl_sync(ALL_LANES, uint64_t(1), 0));
}
BROKEN_KERNEL(race_of_write_and_read) {
    SHARED(float, shared, BROKEN_THREADS);
    shared[threadIdx.x] = 1.0f;
    __syncthreads();
    shared[threadIdx.x] = shared[(threadIdx.x + 1) % BROKEN_THREADS];
}
BROKEN_KERNEL(race_of_two_writes) {
    SHARED(float, shared, 1);
    shared[0] = float(threadIdx.x);
}
BROKEN_KERNEL(race_with_an_atomic) {
    SHARED(unsigned long long, sum, 1);
    if (threadIdx.x == 0) sum[0] = 0;
    atomic_add(sum, 0, 1);
}
BROKEN_KERNEL(shared_memory_not_written) {
    SHARED(float, shared, BROKEN_THREADS);
    args.data[threadIdx.x] = shared[threadIdx.x];
}
BROKEN_KERNEL(shared_memory_past_the_end) {
    SHARED(float, shared, BROKEN_THREADS);
    shared[threadIdx.x + 1] = 1.0f;
}
BROKEN_KERNEL(copy_not_awaited) {
    SHARED(uint4, shared, BROKEN_THREADS);
    copy16_async(shared, threadIdx.x, args.data, true);
    copy_commit();
}
BROKEN_KERNEL(copy_into_what_others_read) {
    SHARED(uint4, shared, BROKEN_THREADS);
    shared[threadIdx.x] = uint4{1, 2, 3, 4};
    __syncthreads();
    const uint4 other = shared[(threadIdx.x + 1) % BROKEN_THREADS];
    args.data[threadIdx.x] = float(other.x);
    copy16_async(shared, threadIdx.x, args.data, true);
    copy_commit();
    copy_wait<0>();
}
BROKEN_KERNEL(unaligned_load) { args.data[threadIdx.x] = float(load16(args.data + 1).x); }
BROKEN_KERNEL(unaligned_store) { *reinterpret_cast<uint2 *>(args.data + 1 + threadIdx.x / 32) = uint2{1, 2}; }
BROKEN_KERNEL(prefetch_past_the_end) { prefetch_line(args.data + 1 + threadIdx.x); }
EAGER_KERNEL(broken_no_wait, BrokenArgs, BROKEN_THREADS) {
    if (threadIdx.x) await_previous();
}
EAGER_KERNEL(broken_early_write, BrokenArgs, BROKEN_THREADS) {
    args.data[threadIdx.x] = 1.0f;
    await_previous();
}
// Reads early what another block has written.
EAGER_KERNEL(broken_early_read, BrokenArgs, BROKEN_THREADS) {
    const float before = args.data[threadIdx.x];
    await_previous();
    args.data[threadIdx.x] = before + 1.0f;
}
