// What all kernels share: number types, fragments of the tensor cores, reductions in a fixed order.
//
// Every kernel takes one struct by value (its Rust twin stands in launch.rs) and is declared with
// KERNEL or EAGER_KERNEL. Shared memory is declared with SHARED and SharedBytes, so that the emulator sees
// each use.
//
// A kernel's blocks may start once all blocks of the one queued before have, while these still run
// (programmatic dependent launch, from compute capability 9.0 on). Only after `await_previous` has all that
// was queued before ended, with its writes to be seen. Until then a thread may read what no kernel
// writes, weights and tables, and nothing else. Each thread comes to it: a kernel that ends with threads
// that do not could end before the one before it, and with that before what its own successor waits for.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;
typedef __half f16;

// An array in shared memory.
template <typename T>
struct Shared {
    T *data;
    __device__ T &operator[](int i) const { return data[i]; }
    __device__ T *address(int i) const { return data + i; }
};

#define SHARED(T, name, count)              \
    __shared__ __align__(16) T name##_[count]; \
    const Shared<T> name{name##_}

// `SharedBytes` takes arrays from the dynamic part, one after the other.
extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
struct SharedBytes {
    unsigned used = 0;
    template <typename T>
    __device__ Shared<T> take(unsigned count) {
        T *start = reinterpret_cast<T *>(dynamic_shared_memory + used);
        used += (count * sizeof(T) + 15) / 16 * 16;
        return Shared<T>{start};
    }
};

// Lets the next kernel's blocks start. First of all: they take only the room that is left.
__device__ inline void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A kernel that calls `await_previous` itself. `...`: most threads, and blocks of so many that a multiprocessor has
// registers for.
#define EAGER_KERNEL(name, Args, ...)                                                                      \
    static __device__ void name##_body(const Args &args);                                                  \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ Args args) {    \
        start_next();                                                                                      \
        name##_body(args);                                                                                 \
    }                                                                                                      \
    static __device__ __forceinline__ void name##_body(const Args &args)

// A kernel that has nothing to do before.
#define KERNEL(name, Args, threads)                                 \
    static __device__ void name##_rest(const Args &args);           \
    EAGER_KERNEL(name, Args, threads) {                             \
        await_previous();                                           \
        name##_rest(args);                                          \
    }                                                               \
    static __device__ __forceinline__ void name##_rest(const Args &args)

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }
template <>
__device__ inline f16 from_float<f16>(float x) { return __float2half(x); }

// c += a · b for a [16 × 16], b [16 × 8], c [16 × 8], spread over a warp as the PTX manual has it
// (mma.m16n8k16): with g = lane / 4 and t = lane % 4, a holds rows g and g + 8 at columns 2t, 2t + 1
// (registers 0 and 1) and 2t + 8, 2t + 9 (registers 2 and 3), b holds column g at rows 2t, 2t + 1 and
// 2t + 8, 2t + 9, and c holds rows g (0, 1) and g + 8 (2, 3) at columns 2t, 2t + 1.
template <typename T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void mma<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes of global memory, 16-byte aligned.
__device__ inline uint4 load16(const void *address) { return *static_cast<const uint4 *>(address); }

// Weights: read once, past the first cache.
template <typename V>
__device__ inline V load_once(const V *address) {
    return __ldcs(address);
}

// Has LINE bytes of global memory brought to the second cache.
__device__ inline void prefetch_line(const void *address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// What was there before.
__device__ inline uint32_t atomic_add(const Shared<uint32_t> &to, int i, uint32_t x) {
    return atomicAdd(to.address(i), x);
}
__device__ inline unsigned long long atomic_add(const Shared<unsigned long long> &to, int i, unsigned long long x) {
    return atomicAdd(to.address(i), x);
}

// Copies 16 aligned bytes of global memory to to[i], or zeros unless `inside`, where nothing is read of `from`, while
// the thread goes on.
// `copy_commit` ends a group of copies, `copy_wait` waits for all but the last groups.
__device__ inline void copy16_async(const Shared<uint4> &to, int i, const void *from, bool inside) {
    const uint32_t at = uint32_t(__cvta_generic_to_shared(to.address(i)));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Two integers below 128 in the low bits of a register's halves, less `zero`, as numbers: the integers
// are put in the last places of 128 or 1024, where they count ones.
template <typename T>
__device__ inline uint32_t small_integers(uint32_t bits, float zero);
template <>
__device__ inline uint32_t small_integers<bf16>(uint32_t bits, float zero) {
    bits |= 0x43004300;
    __nv_bfloat162 numbers;
    memcpy(&numbers, &bits, 4);
    numbers = __hsub2(numbers, __float2bfloat162_rn(128.0f + zero));
    memcpy(&bits, &numbers, 4);
    return bits;
}
template <>
__device__ inline uint32_t small_integers<f16>(uint32_t bits, float zero) {
    bits |= 0x64006400;
    __half2 numbers;
    memcpy(&numbers, &bits, 4);
    numbers = __hsub2(numbers, __float2half2_rn(1024.0f + zero));
    memcpy(&bits, &numbers, 4);
    return bits;
}

// Two numbers of type f16 in one register.
__device__ inline float2 halves(uint32_t bits) {
    __half2 pair;
    memcpy(&pair, &bits, 4);
    return __half22float2(pair);
}

#else
#include "../emulator/emulate.h"
#endif

constexpr int WARP = 32;
constexpr int LINE = 128;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Two numbers in one register, the first in the low half.
template <typename T>
__device__ inline uint32_t pack2(float low, float high) {
    T pair[2] = {from_float<T>(low), from_float<T>(high)};
    uint32_t bits;
    memcpy(&bits, pair, 4);
    return bits;
}

// Sum over a warp; every lane gets it. The order is fixed.
__device__ inline float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// Sum over a block of whole warps; every thread gets it. The order is fixed.
template <int WARPS>
__device__ inline float block_sum(float x) {
    SHARED(float, sums, WARPS);
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < WARPS; warp++) sum += sums[warp];
    return sum;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// silu(gate) · up
template <typename T>
__device__ inline T gated(T gate, T up) {
    const float x = to_float(gate);
    return from_float<T>(x * sigmoid(x) * to_float(up));
}
