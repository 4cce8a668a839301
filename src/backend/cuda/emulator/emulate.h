// CUDA's names on the host: what the kernels use, with their meaning, for tests on any machine.
//
// Blocks run one by one; the threads of a block are fibers, which run until they wait for others. Shared
// memory is behind objects that see every use: bounds, use before a write, and two accesses of different
// threads, one of them a write, with no barrier between them. A barrier that not all threads reach, a warp
// whose lanes do different things and an access outside device memory end the kernel with a report. So do
// an access to what kernels write before `await_previous`, and a thread that ends without that.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict

using std::max;
using std::min;

struct dim3 {
    uint32_t x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emulated {

constexpr int LANES = 32;

// The thread whose turn it is.
struct Thread {
    dim3 index;
    uint32_t linear;
    uint32_t barriers, warp_barriers;  // passed so far
    bool awaited;                      // what was queued before
};
extern Thread *thread;
extern dim3 block_index, block_size, grid_size;

// Ends the kernel. Never returns.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

void barrier();
void warp_barrier();
void await_queued();

// Waits until all lanes of the warp have come with `bytes` of `given` to the same `operation`; then
// gives what lane `lane` brought.
const void *exchange(const char *operation, const void *given, size_t bytes);
const void *given_by(const void *exchanged, int lane);

// The block's shared array that `key` names, of `bytes`.
void *shared_array(const void *key, size_t bytes);
void *dynamic_array(size_t from, size_t bytes);
enum class Use { Read, Write, Atomic };
void shared_access(const void *address, size_t bytes, Use use);

// Copies of 16 bytes to shared memory that go on while the thread does: until they have been waited for,
// what they will write is not there.
void copy_begin(void *to, const void *from);
void end_copies();
void await_copies(uint32_t groups);

// Fails unless 16 bytes can be moved at once.
void check_alignment(const void *address);
// Fails unless it is one of device memory, though nothing is read there.
void check_prefetch(const void *address);

// Most threads of a block, and blocks of so many that a multiprocessor has room for.
struct LaunchBounds {
    uint32_t threads, blocks = 1;
};

// A kernel, by name.
struct Kernel {
    const char *name;
    size_t argument_bytes;
    LaunchBounds bounds;
    bool eager;  // does something before `await_previous`
    void (*run)(const void *arguments);
    const Kernel *next;
    Kernel(const char *name, size_t argument_bytes, LaunchBounds bounds, bool eager, void (*run)(const void *));
};

template <typename T>
class Element {
    T *address;

public:
    explicit Element(T *address) : address(address) {}
    operator T() const {
        shared_access(address, sizeof(T), Use::Read);
        return *address;
    }
    Element &operator=(const T &value) {
        shared_access(address, sizeof(T), Use::Write);
        *address = value;
        return *this;
    }
    Element &operator=(const Element &other) { return *this = T(other); }
    Element &operator+=(const T &value) { return *this = T(*this) + value; }
};

}  // namespace emulated

#define threadIdx (emulated::thread->index)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)

template <typename T>
struct Shared {
    T *data;
    size_t count;
    emulated::Element<T> operator[](int64_t i) const {
        if (i < 0 || size_t(i) >= count)
            emulated::fail("shared memory: index %lld of an array of %zu", (long long)i, count);
        return emulated::Element<T>(data + i);
    }
    T *address(int64_t i) const {
        (*this)[i];
        return data + i;
    }
};

#define SHARED(T, name, count)                        \
    static const char name##_key = 0;                 \
    const Shared<T> name {                            \
        static_cast<T *>(emulated::shared_array(&name##_key, sizeof(T) * (count))), size_t(count) \
    }

struct SharedBytes {
    size_t used = 0;
    template <typename T>
    Shared<T> take(size_t count) {
        T *start = static_cast<T *>(emulated::dynamic_array(used, count * sizeof(T)));
        used += (count * sizeof(T) + 15) / 16 * 16;
        return {start, count};
    }
};

// `...`: the launch bounds.
#define DEFINE_KERNEL(name, Args, eager, start, ...)                                                     \
    static void name(const Args &args);                                                                  \
    static const emulated::Kernel name##_kernel(#name, sizeof(Args), {__VA_ARGS__}, eager, [](const void *arguments) { \
        start;                                                                                           \
        name(*static_cast<const Args *>(arguments));                                                     \
    });                                                                                                  \
    static void name([[maybe_unused]] const Args &args)
#define EAGER_KERNEL(name, Args, ...) DEFINE_KERNEL(name, Args, true, {}, __VA_ARGS__)
#define KERNEL(name, Args, threads) DEFINE_KERNEL(name, Args, false, await_previous(), threads)

inline void await_previous() { emulated::await_queued(); }
inline void __syncthreads() { emulated::barrier(); }
inline void __syncwarp() { emulated::warp_barrier(); }

template <typename T>
T __shfl_sync(uint32_t, T value, int lane) {
    const void *all = emulated::exchange("shfl", &value, sizeof(T));
    T found;
    memcpy(&found, emulated::given_by(all, lane % emulated::LANES), sizeof(T));
    return found;
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int step) {
    return __shfl_sync(mask, value, int(emulated::thread->linear % emulated::LANES) ^ step);
}

inline float __fmul_rn(float a, float b) { return a * b; }

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// bfloat16 and float16, rounded to nearest even.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

uint16_t to_f16_bits(float x);
float from_f16_bits(uint16_t bits);

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline float to_float(f16 x) { return from_f16_bits(x.bits); }

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) { return {to_f16_bits(x)}; }

inline uint4 load16(const void *address) {
    emulated::check_alignment(address);
    return *static_cast<const uint4 *>(address);
}
template <typename V>
inline V load_once(const V *address) {
    if (sizeof(V) == 16) emulated::check_alignment(address);
    return *address;
}

inline void prefetch_line(const void *address) { emulated::check_prefetch(address); }

template <typename T>
T atomic_add(const Shared<T> &to, int64_t i, std::common_type_t<T> x) {
    emulated::shared_access(to.address(i), sizeof x, emulated::Use::Atomic);
    const T before = *to.address(i);
    *to.address(i) += x;
    return before;
}

inline void copy16_async(const Shared<uint4> &to, int64_t i, const void *from, bool inside) {
    emulated::copy_begin(to.address(i), inside ? from : nullptr);
}
inline void copy_commit() { emulated::end_copies(); }
template <int GROUPS>
inline void copy_wait() { emulated::await_copies(GROUPS); }

// Two integers below 128 in the low bits of a register's halves, less `zero`, as numbers.
template <typename T>
uint32_t small_integers(uint32_t bits, float zero) {
    const T pair[2] = {from_float<T>(float(bits & 0xffff) - zero), from_float<T>(float(bits >> 16) - zero)};
    uint32_t numbers;
    memcpy(&numbers, pair, 4);
    return numbers;
}

// Two numbers of type f16 in one register.
inline float2 halves(uint32_t bits) { return {from_f16_bits(uint16_t(bits)), from_f16_bits(uint16_t(bits >> 16))}; }

// c += a · b over a warp, operands spread as in common.cuh.
template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Operands {
        uint32_t a[4], b[2];
    } own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const void *all = emulated::exchange("mma", &own, sizeof own);
    const auto number = [](uint32_t bits, int half) {
        return to_float(T{uint16_t(half ? bits >> 16 : bits)});
    };
    const auto operands = [&](int lane) { return static_cast<const Operands *>(emulated::given_by(all, lane)); };
    const int lane = emulated::thread->linear % emulated::LANES, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        const int column = 2 * t + i % 2, lower = i / 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; k++) {
            const Operands *row = operands(4 * g + k % 8 / 2), *col = operands(4 * column + k % 8 / 2);
            sum += number(row->a[lower + 2 * (k / 8)], k % 2) * number(col->b[k / 8], k % 2);
        }
        c[i] += sum;
    }
}
