// Memory of the emulated device, with bounds and lifetimes; who has written it.
#include "device.h"

#include <map>
#include <mutex>
#include <set>
#include <sys/mman.h>
#include <unistd.h>

namespace emulated {

namespace {

constexpr size_t ALIGNMENT = 16;  // less than a GPU's 256, so that little lies between an end and its page's
constexpr unsigned char CANARY = 0xa5;
constexpr unsigned char UNINITIALISED = 0xff;  // NaN in every float type

struct Allocation {
    size_t bytes;
    char *pages;
    size_t page_bytes;
    bool live;    // the driver's
    bool usable;  // given out by the pool that has it
    void protect(int access) const { mprotect(pages, page_bytes, access); }
};

std::mutex memory_lock;
std::map<uintptr_t, Allocation> allocations;
std::set<uintptr_t> written;  // by kernels, to whom all other memory is read-only until they write to it
size_t live_bytes = 0;

size_t pages_for(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

bool canaries_intact(uintptr_t start, const Allocation &allocation) {
    const unsigned char *end = reinterpret_cast<unsigned char *>(allocation.pages + allocation.page_bytes);
    for (const unsigned char *at = reinterpret_cast<unsigned char *>(start) + allocation.bytes; at < end; at++)
        if (*at != CANARY) return false;
    return true;
}

// The usable allocation whose pages hold `address`.
const std::pair<const uintptr_t, Allocation> *allocation_at(const void *address) {
    const char *at = static_cast<const char *>(address);
    auto after = allocations.upper_bound(reinterpret_cast<uintptr_t>(at));
    for (int near = 0; near < 2; near++) {  // a start lies behind that of its pages
        if (after != allocations.end()) {
            const Allocation &found = after->second;
            if (found.usable && at >= found.pages && at < found.pages + found.page_bytes) return &*after;
        }
        if (after == allocations.begin()) break;
        --after;
    }
    return nullptr;
}

// As memory is that nobody has written. Large allocations keep what is there: filling them would commit them.
void fill(void *start, const Allocation &allocation) {
    char *end = allocation.pages + allocation.page_bytes, *last = static_cast<char *>(start) + allocation.bytes;
    if (allocation.bytes <= 1 << 20) memset(start, UNINITIALISED, allocation.bytes);
    memset(last, CANARY, end - last);
}

// Out of reach from now on; false when it was overrun.
bool retire(uintptr_t start, Allocation &allocation, std::string &report) {
    const bool intact = canaries_intact(start, allocation);
    if (!intact) report = "a write past the end of an allocation of " + std::to_string(allocation.bytes) + " bytes";
    allocation.protect(PROT_NONE);
    allocation.usable = false;
    written.erase(start);
    return intact;
}

// What kernels have written, out of reach or within.
void protect_written(int access) {
    for (const uintptr_t start : written) allocations.at(start).protect(access);
}

}  // namespace

void *allocate(size_t bytes) {
    const size_t size = std::max<size_t>(bytes, 1), used = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const size_t page_bytes = pages_for(used), guard = pages_for(1);
    char *mapped = static_cast<char *>(mmap(nullptr, page_bytes + 2 * guard, PROT_NONE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapped == MAP_FAILED) return nullptr;
    char *pages = mapped + guard;
    mprotect(pages, page_bytes, PROT_READ | PROT_WRITE);
    char *start = pages + page_bytes - used;
    fill(start, {size, pages, page_bytes, true, true});
    mprotect(pages, page_bytes, PROT_READ);
    std::lock_guard<std::mutex> lock(memory_lock);
    allocations[reinterpret_cast<uintptr_t>(start)] = {size, pages, page_bytes, true, true};
    live_bytes += size;
    return start;
}

bool give(void *start, std::string &report) {
    std::lock_guard<std::mutex> lock(memory_lock);
    const auto found = allocations.find(reinterpret_cast<uintptr_t>(start));
    if (found == allocations.end() || !found->second.live) {
        report = "the pool gives out what the driver has not given";
        return false;
    }
    found->second.protect(PROT_READ | PROT_WRITE);
    fill(start, found->second);
    found->second.protect(PROT_READ);
    found->second.usable = true;
    written.erase(found->first);
    return true;
}

bool take_back(void *start, std::string &report) {
    std::lock_guard<std::mutex> lock(memory_lock);
    const auto found = allocations.find(reinterpret_cast<uintptr_t>(start));
    return found == allocations.end() || !found->second.usable || retire(found->first, found->second, report);
}

bool release(void *start, std::string &report) {
    std::lock_guard<std::mutex> lock(memory_lock);
    const auto found = allocations.find(reinterpret_cast<uintptr_t>(start));
    if (found == allocations.end() || !found->second.live) {
        report = found == allocations.end() ? "free of what was never allocated" : "double free";
        return false;
    }
    const bool intact = !found->second.usable || retire(found->first, found->second, report);
    madvise(found->second.pages, found->second.page_bytes, MADV_DONTNEED);
    found->second.live = false;
    live_bytes -= found->second.bytes;
    return intact;
}

void write_memory(void *to, size_t bytes, const std::function<void()> &write) {
    std::lock_guard<std::mutex> lock(memory_lock);
    const auto *found = bytes ? allocation_at(to) : nullptr;
    if (!found) return;
    found->second.protect(PROT_READ | PROT_WRITE);
    write();
    found->second.protect(PROT_READ);
    written.erase(found->first);
}

bool is_device_memory(const void *address, size_t bytes) {
    std::lock_guard<std::mutex> lock(memory_lock);
    auto after = allocations.upper_bound(reinterpret_cast<uintptr_t>(address));
    if (after == allocations.begin()) return false;
    const auto &[start, allocation] = *--after;
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    return allocation.usable && at + bytes <= start + allocation.bytes;
}

std::string describe(const void *address) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    std::string best = "no device memory";
    const size_t guard = pages_for(1);
    for (const auto &[start, allocation] : allocations) {
        const uintptr_t pages = reinterpret_cast<uintptr_t>(allocation.pages);
        if (at < pages - guard || at >= pages + allocation.page_bytes + guard) continue;
        const std::string size = std::to_string(allocation.bytes) + " bytes";
        if (!allocation.usable) return "freed memory (it was an allocation of " + size + ")";
        best = at < start ? "before an allocation of " + size : "past the end of an allocation of " + size;
    }
    return best;
}

size_t allocated_bytes() {
    std::lock_guard<std::mutex> lock(memory_lock);
    return live_bytes;
}

}  // namespace emulated
