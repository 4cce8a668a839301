// The emulated device: blocks of fibers, and the shared memory between them. Of one unit with memory.cpp.
#include "device.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <unordered_map>

// Saves the callee's registers on the stack, leaves the stack pointer in *from and goes on at `to`.
extern "C" void emulated_switch(void **from, void *to);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace emulated {

Thread *thread;
dim3 block_index, block_size, grid_size;

// ---------------------------------------------------------------- shared memory

namespace {

constexpr uint32_t NOBODY = ~0u, SEVERAL = ~0u - 1;

// Who touched a byte last, and when.
struct Access {
    uint32_t thread = NOBODY, warp = NOBODY;  // or SEVERAL
    uint32_t barriers = 0, warp_barriers = 0;
    bool atomic = false;
};
struct ByteHistory {
    Access write, read;
};

struct SharedArray {
    std::unique_ptr<char[]> storage;
    char *start;
    std::vector<ByteHistory> history;
    size_t bytes;
    SharedArray(size_t bytes) : storage(new char[bytes + 16]), history(bytes), bytes(bytes) {
        start = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(storage.get()) + 15) / 16 * 16);
        memset(start, UNINITIALISED, bytes);
    }
};

std::unordered_map<const void *, SharedArray> shared_arrays;
std::unique_ptr<SharedArray> dynamic;

// Whether a barrier lies between an earlier access and now.
bool ordered(const Access &earlier) {
    if (earlier.thread == NOBODY || earlier.thread == thread->linear) return true;
    if (earlier.barriers != thread->barriers) return true;
    return earlier.warp == thread->linear / LANES && earlier.warp_barriers != thread->warp_barriers;
}

SharedArray *array_at(const void *address) {
    const char *at = static_cast<const char *>(address);
    if (dynamic && at >= dynamic->start && at < dynamic->start + dynamic->bytes) return dynamic.get();
    for (auto &[key, array] : shared_arrays)
        if (at >= array.start && at < array.start + array.bytes) return &array;
    return nullptr;
}

}  // namespace

void *shared_array(const void *key, size_t bytes) {
    return shared_arrays.try_emplace(key, bytes).first->second.start;
}

void *dynamic_array(size_t from, size_t bytes) {
    const size_t there = dynamic ? dynamic->bytes : 0;
    if (from + bytes > there)
        fail("dynamic shared memory: %zu bytes from %zu, launched with %zu", bytes, from, there);
    return dynamic->start + from;
}

void shared_access(const void *address, size_t bytes, Use use) {
    SharedArray *array = array_at(address);
    if (!array) fail("shared memory of another block");
    const bool write = use != Use::Read, atomic = use == Use::Atomic;
    const size_t first = static_cast<const char *>(address) - array->start;
    const Access now = {thread->linear, thread->linear / LANES, thread->barriers, thread->warp_barriers, atomic};
    for (size_t i = first; i < first + bytes; i++) {
        ByteHistory &history = array->history[i];
        if (use != Use::Write && history.write.thread == NOBODY)
            fail("shared memory: byte %zu is read before it is written", i);
        if (!ordered(history.write) && !(atomic && history.write.atomic))
            fail("shared memory race: byte %zu is %s by thread %u and was written by thread %u, with no barrier between",
                 i, write ? "written" : "read", thread->linear, history.write.thread);
        if (write && !ordered(history.read))
            fail("shared memory race: byte %zu is written by thread %u and was read by others, with no barrier between",
                 i, thread->linear);
        if (write) {
            // A thread's own write before an atomic one of its own is still one that others may meet.
            const Access &last = history.write;
            const bool plain = last.thread == now.thread && last.barriers == now.barriers && !last.atomic;
            history = {now, {}};
            history.write.atomic = atomic && !plain;
        } else {
            const bool others = !ordered(history.read), other_warps = history.read.warp != now.warp;
            history.read = now;
            if (others) history.read.thread = SEVERAL;
            if (others && other_warps) history.read.warp = SEVERAL;
        }
    }
}

// ---------------------------------------------------------------- fibers

namespace {

constexpr size_t STACK_BYTES = 128 << 10;

enum class Waiting { No, Barrier, WarpBarrier, Exchange, Previous, Done };

struct Copy {
    void *to;
    const void *from;  // null: zeros
    uint32_t group;
};

struct Fiber {
    Thread thread;
    void *stack_pointer;
    char *stack;
    Waiting waiting;
    std::vector<Copy> copies;  // not waited for
    uint32_t groups;           // of copies, so far
};

struct Warp {
    int arrived = 0, arrived_at_barrier = 0, lanes = 0;
    const char *operation = nullptr;
    size_t bytes = 0;
    // Two sets: lanes may still read the last exchange while the next one begins.
    uint64_t given[2][LANES][8];
    int set = 0;
};

std::mutex device_lock;  // one kernel at a time
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<char *> stacks;
Fiber *current;
void *scheduler_stack_pointer;
uint32_t at_barrier, awaiting, finished;
const Kernel *running;
const void *running_arguments;
std::string failure;
bool failed;

void back_to_scheduler() { emulated_switch(&current->stack_pointer, scheduler_stack_pointer); }

void wait(Waiting what) {
    current->waiting = what;
    back_to_scheduler();
}

void run_fiber() {
    running->run(running_arguments);
    if (!current->copies.empty()) fail("copies to shared memory that nobody has waited for");
    if (!thread->awaited) fail("a thread ends without await_previous");
    finished++;
    current->waiting = Waiting::Done;
    back_to_scheduler();
    abort();
}

char *stack_of(size_t index) {
    while (stacks.size() <= index) {
        char *stack = static_cast<char *>(mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        mprotect(stack, 4096, PROT_NONE);
        stacks.push_back(stack);
    }
    return stacks[index];
}

void prepare(Fiber &fiber, uint32_t index) {
    fiber.thread = {{index % block_size.x, index / block_size.x % block_size.y, index / block_size.x / block_size.y},
                    index, 0, 0, false};
    fiber.stack = stack_of(index);
    fiber.waiting = Waiting::No;
    fiber.copies.clear();
    fiber.groups = 0;
    void **top = reinterpret_cast<void **>(fiber.stack + STACK_BYTES) - 2;
    *top = reinterpret_cast<void *>(run_fiber);  // where the first switch returns to
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.stack_pointer = top;
}

void release_barrier() {
    at_barrier = 0;
    for (Fiber &fiber : fibers) {
        fiber.thread.barriers++;
        fiber.waiting = Waiting::No;
    }
}

void run_block() {
    const uint32_t count = block_size.x * block_size.y * block_size.z;
    fibers.resize(count);
    warps.assign((count + LANES - 1) / LANES, Warp());
    at_barrier = awaiting = finished = 0;
    if (running->eager) protect_written(PROT_NONE);
    for (uint32_t i = 0; i < count; i++) {
        prepare(fibers[i], i);
        warps[i / LANES].lanes++;
    }
    while (finished < count && !failed) {
        bool moved = false;
        for (Fiber &fiber : fibers) {
            if (fiber.waiting != Waiting::No) continue;
            moved = true;
            current = &fiber;
            thread = &fiber.thread;
            emulated_switch(&scheduler_stack_pointer, fiber.stack_pointer);
            if (failed) return;
        }
        if (!moved) {
            failed = true;
            failure = at_barrier ? "a barrier is not reached by all threads: " + std::to_string(at_barrier) + " of " +
                                       std::to_string(count) + " wait, " + std::to_string(finished) + " have ended"
                      : awaiting % count ? "await_previous is not reached by all threads"
                                         : "the lanes of a warp do not all reach an operation of the warp";
        }
    }
}

// Whether it was a kernel's first write to an allocation, which may go on.
bool is_first_write(const void *address, const void *context) {
    constexpr greg_t WRITE = 2;  // of a page fault's error code
    if (!(static_cast<const ucontext_t *>(context)->uc_mcontext.gregs[REG_ERR] & WRITE)) return false;
    const auto *found = allocation_at(address);
    if (!found || !thread->awaited || !written.insert(found->first).second) return false;
    found->second.protect(PROT_READ | PROT_WRITE);
    return true;
}

void on_fault(int signal, siginfo_t *info, void *context) {
    if (!running || failed) {  // not ours: as without us
        ::signal(signal, SIG_DFL);
        return;
    }
    if (signal == SIGSEGV && is_first_write(info->si_addr, context)) return;
    sigset_t faults;
    sigemptyset(&faults);
    sigaddset(&faults, SIGSEGV);
    sigaddset(&faults, SIGBUS);
    sigaddset(&faults, SIGILL);
    sigprocmask(SIG_UNBLOCK, &faults, nullptr);
    if (signal == SIGILL) fail("a number is read or written at no multiple of its alignment");
    if (allocation_at(info->si_addr)) fail("memory that kernels write is accessed before await_previous");
    fail("access to %s", describe(info->si_addr).c_str());
}

// Faults of kernels become reports. On a stack of its own: a fiber's may be what overflowed.
void catch_faults() {
    static bool done = false;
    if (done) return;
    done = true;
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    sigaction(SIGILL, &action, nullptr);
}

const Kernel *&kernels() {
    static const Kernel *first = nullptr;
    return first;
}

}  // namespace

Kernel::Kernel(const char *name, size_t argument_bytes, LaunchBounds bounds, bool eager, void (*run)(const void *))
    : name(name), argument_bytes(argument_bytes), bounds(bounds), eager(eager), run(run), next(kernels()) {
    kernels() = this;
}

const Kernel *find_kernel(const std::string &name) {
    for (const Kernel *kernel = kernels(); kernel; kernel = kernel->next)
        if (name == kernel->name) return kernel;
    return nullptr;
}

void fail(const char *format, ...) {
    char message[512], where[256];
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    snprintf(where, sizeof where, " (kernel %s, block %u %u %u, thread %u)", running->name, block_index.x,
             block_index.y, block_index.z, thread->linear);
    failure = std::string(message) + where;
    failed = true;
    back_to_scheduler();
    abort();
}

void barrier() {
    if (++at_barrier == fibers.size()) {
        release_barrier();
        return;
    }
    wait(Waiting::Barrier);
}

void warp_barrier() {
    Warp &warp = warps[thread->linear / LANES];
    if (++warp.arrived_at_barrier < warp.lanes) {
        wait(Waiting::WarpBarrier);
        return;
    }
    warp.arrived_at_barrier = 0;
    const uint32_t first = thread->linear / LANES * LANES;
    for (uint32_t i = first; i < first + warp.lanes; i++) {
        fibers[i].thread.warp_barriers++;
        if (fibers[i].waiting == Waiting::WarpBarrier) fibers[i].waiting = Waiting::No;
    }
}

void await_queued() {
    if (thread->awaited) return;
    thread->awaited = true;
    if (!running->eager) return;
    if (++awaiting < fibers.size()) {
        wait(Waiting::Previous);
        return;
    }
    protect_written(PROT_READ | PROT_WRITE);
    for (Fiber &fiber : fibers)
        if (fiber.waiting == Waiting::Previous) fiber.waiting = Waiting::No;
}

void check_alignment(const void *address) {
    if (reinterpret_cast<uintptr_t>(address) % 16) fail("16 bytes at %p, which is no multiple of 16", address);
}

void check_prefetch(const void *address) {
    if (!is_device_memory(address, 1)) fail("prefetch: access to %s", describe(address).c_str());
}

void copy_begin(void *to, const void *from) {
    check_alignment(to);
    check_alignment(from);
    shared_access(to, 16, Use::Write);
    memset(to, UNINITIALISED, 16);
    current->copies.push_back({to, from, current->groups});
}

void end_copies() { current->groups++; }

void await_copies(uint32_t groups) {
    std::vector<Copy> left;
    for (const Copy &copy : current->copies) {
        if (copy.group + groups >= current->groups) {
            left.push_back(copy);
            continue;
        }
        shared_access(copy.to, 16, Use::Write);
        if (copy.from) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    }
    current->copies.swap(left);
}

const void *exchange(const char *operation, const void *given, size_t bytes) {
    Warp &warp = warps[thread->linear / LANES];
    if (warp.lanes != LANES) fail("%s in a warp of %d lanes", operation, warp.lanes);
    if (bytes > sizeof warp.given[0][0]) fail("%s of %zu bytes", operation, bytes);
    if (warp.arrived == 0) {
        warp.operation = operation;
        warp.bytes = bytes;
    } else if (warp.operation != operation || warp.bytes != bytes) {
        fail("lanes of a warp do different things: %s and %s", warp.operation, operation);
    }
    const int set = warp.set;
    memcpy(warp.given[set][thread->linear % LANES], given, bytes);
    if (++warp.arrived < LANES) {
        wait(Waiting::Exchange);
        return warp.given[set];
    }
    warp.arrived = 0;
    warp.set = 1 - set;
    const uint32_t first = thread->linear / LANES * LANES;
    for (uint32_t i = first; i < first + LANES; i++)
        if (fibers[i].waiting == Waiting::Exchange) fibers[i].waiting = Waiting::No;
    return warp.given[set];
}

const void *given_by(const void *exchanged, int lane) {
    return static_cast<const char *>(exchanged) + lane * sizeof(uint64_t[8]);
}

bool run_kernel(const Kernel &kernel, dim3 grid, dim3 block, size_t shared_bytes, const void *arguments,
                std::string &report) {
    std::lock_guard<std::mutex> lock(device_lock);
    catch_faults();
    running = &kernel;
    running_arguments = arguments;
    grid_size = grid;
    block_size = block;
    failed = false;
    if (block.x * block.y * block.z > kernel.bounds.threads) {
        failed = true;
        failure = std::string(kernel.name) + " has at most " + std::to_string(kernel.bounds.threads) + " threads";
    }
    for (uint32_t z = 0; z < grid.z && !failed; z++)
        for (uint32_t y = 0; y < grid.y && !failed; y++)
            for (uint32_t x = 0; x < grid.x && !failed; x++) {
                block_index = {x, y, z};
                shared_arrays.clear();
                dynamic.reset(shared_bytes ? new SharedArray(shared_bytes) : nullptr);
                run_block();
            }
    if (failed) protect_written(PROT_READ | PROT_WRITE);
    running = nullptr;
    report = failure;
    return !failed;
}

}  // namespace emulated

// ---------------------------------------------------------------- numbers

static float f16_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(float(mantissa), -24);
    return sign * std::ldexp(float(mantissa + 1024), exponent - 25);
}

float from_f16_bits(uint16_t bits) {
    static const std::vector<float> values = [] {
        std::vector<float> all(1 << 16);
        for (size_t i = 0; i < all.size(); i++) all[i] = f16_value(uint16_t(i));
        return all;
    }();
    return values[bits];
}

uint16_t to_f16_bits(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (x != x) return sign | 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size == 0.0f) return sign;
    int exponent;
    std::frexp(size, &exponent);  // size in [2^(exponent - 1), 2^exponent)
    exponent = std::max(exponent - 1, -14);
    const long mantissa = std::lrint(std::ldexp(size, 10 - exponent));  // ties to even
    // A carry out of the mantissa is a step of the exponent; below 1024 the number is subnormal.
    return sign | uint16_t(mantissa + (long(exponent + 14) << 10));
}
