// The emulated driver: CUDA's driver functions over the emulated device.
//
// Work is queued and done when somebody waits for it, so that a missing wait shows. As with a GPU, copies
// from and to ordinary host memory are done at once, those of pinned memory when their turn comes.
#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <set>

using namespace emulated;

namespace {

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    INVALID_CONTEXT = 201,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

// A piece of queued work. False: it failed, and says why.
using Work = std::function<bool(std::string &)>;

struct Graph {
    std::vector<Work> nodes;
};

struct Stream {
    std::deque<Work> queue;
    uint64_t queued = 0, done = 0;
    bool capturing = false, invalid = false;  // a capture; one that something forbidden has ended
    int mode = 0;
    Graph captured;
};

struct Event {
    Stream *stream = nullptr;
    uint64_t after = 0;
};

struct Function {
    const Kernel *kernel;
    void *context;  // of its module
    size_t shared_bytes = 48 << 10;  // that a launch may ask for
};

// CUlaunchAttribute and CUlaunchConfig.
struct Attribute {
    int id, padding;
    alignas(8) int number;
    char rest[60];
};
struct Launch {
    dim3 grid, block;
    unsigned shared_bytes;
    void *stream;
    const Attribute *attributes;
    unsigned num_attributes;
};

constexpr int COMPUTE_CAPABILITY[] = {9, 8};  // of each GPU, in front of the point
constexpr int MULTIPROCESSORS = 4;
constexpr int SHARED_BYTES = 99 << 10;  // that a function may be allowed

std::recursive_mutex lock;
std::set<Stream *> streams;
Stream default_stream;
std::map<const char *, size_t> pinned;
thread_local std::map<std::string, uint64_t> counts;  // what this host thread has made happen
std::string last_report;
int sticky = SUCCESS;  // as on a GPU, a fault ends the context
thread_local void *current_context;
char contexts[std::size(COMPUTE_CAPABILITY)];

size_t total_memory() {
    const char *given = getenv("ASTRAI_EMULATED_MEMORY");
    return given ? strtoull(given, nullptr, 10) : size_t(8) << 30;
}

Stream *stream_of(void *handle) {
    // Null and the two special handles are the default stream.
    return reinterpret_cast<uintptr_t>(handle) <= 2 ? &default_stream : static_cast<Stream *>(handle);
}

int fault(const std::string &report) {
    last_report = report;
    fprintf(stderr, "emulated CUDA: %s\n", report.c_str());
    return sticky = ILLEGAL_ADDRESS;
}

// Does what is queued, or the first of it: until `last` pieces in all are done.
int finish(Stream *stream, uint64_t last = UINT64_MAX) {
    if (stream->capturing) return CAPTURE_UNSUPPORTED;
    while (!stream->queue.empty() && stream->done < last) {
        const Work work = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->done++;
        std::string report;
        if (!sticky && !work(report)) fault(report);
    }
    return sticky;
}

int finish_all() {
    finish(&default_stream);
    for (Stream *stream : streams)
        if (!stream->capturing) finish(stream);
    return sticky;
}

constexpr int RELAXED = 2;

// Ends captures, but for those of mode `allowed`, with something that is forbidden while they last.
int forbid(int allowed) {
    int status = SUCCESS;
    for (Stream *stream : streams) {
        if (!stream->capturing || stream->mode == allowed) continue;
        stream->invalid = true;
        status = CAPTURE_UNSUPPORTED;
    }
    return status;
}

int enqueue(void *handle, Work work) {
    Stream *stream = stream_of(handle);
    if (stream->capturing && stream->invalid) return CAPTURE_INVALIDATED;
    if (stream->capturing) {
        stream->captured.nodes.push_back(std::move(work));
    } else {
        stream->queue.push_back(std::move(work));
        stream->queued++;
    }
    return sticky;
}

bool is_pinned(const void *address) {
    auto after = pinned.upper_bound(static_cast<const char *>(address));
    if (after == pinned.begin()) return false;
    --after;
    return address < after->first + after->second;
}

Work copy(void *to, const void *from, size_t bytes, bool check_to, bool check_from) {
    const bool is_staged = is_pinned(to) || is_pinned(from);
    return [=](std::string &report) {
        if (is_staged && !is_pinned(to) && !is_pinned(from)) {
            report = "copy of " + std::to_string(bytes) + " bytes: page-locked memory that has been freed";
            return false;
        }
        for (const auto &[address, check] : {std::pair<const void *, bool>(to, check_to), {from, check_from}}) {
            if (check && bytes && !is_device_memory(address, bytes)) {
                report = "copy of " + std::to_string(bytes) + " bytes: access to " + describe(address);
                return false;
            }
        }
        const auto write = [=] { memcpy(to, from, bytes); };
        if (check_to) write_memory(to, bytes, write);
        else write();
        return true;
    };
}

int wait_event(Event *event) {
    return event->stream && event->stream->done < event->after ? finish(event->stream, event->after) : sticky;
}

// Whether the function's GPU has programmatic dependent launch.
bool starts_early(const Function &function) {
    return COMPUTE_CAPABILITY[static_cast<char *>(function.context) - contexts] >= 9;
}

using Guard = std::lock_guard<std::recursive_mutex>;

}  // namespace

extern "C" {

int cu_init(unsigned) { return sticky; }
int cu_driver_get_version(int *version) {
    *version = 13000;
    return SUCCESS;
}
int cu_device_get(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < int(std::size(contexts)) ? SUCCESS : 101;  // INVALID_DEVICE
}
int cu_device_get_count(int *count) {
    *count = std::size(contexts);
    return SUCCESS;
}
int cu_device_get_name(char *name, int bytes, int) {
    snprintf(name, bytes, "emulated GPU");
    return SUCCESS;
}
int cu_device_get_attribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 16: *value = MULTIPROCESSORS; break;
    case 75: *value = COMPUTE_CAPABILITY[device]; break;
    case 97: *value = SHARED_BYTES; break;
    case 115: *value = 1; break;  // memory pools
    default: *value = 0;
    }
    return SUCCESS;
}
int cu_ctx_retain(void **out, int device) {
    *out = &contexts[device];
    return SUCCESS;
}
int cu_ctx_release(int) { return SUCCESS; }
int cu_ctx_get_current(void **out) {
    *out = current_context;
    return SUCCESS;
}
int cu_ctx_set_current(void *given) {
    current_context = given;
    return SUCCESS;
}
int cu_ctx_synchronize() {
    Guard guard(lock);
    if (const int status = forbid(-1)) return status;
    return finish_all();
}
int cu_ctx_destroy(void *) { return SUCCESS; }

int cu_module_load_data(void **module, const void *) {
    *module = current_context;
    return SUCCESS;
}
int cu_module_get_function(void **function, void *module, const char *name) {
    Guard guard(lock);
    const Kernel *kernel = find_kernel(name);
    if (!kernel) {
        last_report = std::string("there is no kernel ") + name;
        return NOT_FOUND;
    }
    *function = new Function{kernel, module};  // lives as long as the process, like its module
    return SUCCESS;
}
int cu_module_unload(void *) { return SUCCESS; }
int cu_func_set_attribute(void *function, int attribute, int value) {
    Function &changed = *static_cast<Function *>(function);
    if (attribute == 9) return value <= 100 && starts_early(changed) ? SUCCESS : INVALID_VALUE;  // SHARED_MEMORY_CARVEOUT
    if (attribute != 8 || value > SHARED_BYTES) return INVALID_VALUE;  // MAX_DYNAMIC_SHARED_SIZE_BYTES
    changed.shared_bytes = value;
    return SUCCESS;
}
// Every kernel of ours may start early where its GPU lets it.
int cu_launch_kernel_ex(const Launch *launch, void *handle, void **arguments, void **) {
    Guard guard(lock);
    const Function &function = *static_cast<Function *>(handle);
    if (current_context != function.context) return INVALID_CONTEXT;
    const dim3 grid = launch->grid, block = launch->block;
    const size_t shared_bytes = launch->shared_bytes;
    if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z || grid.y > 65535 || grid.z > 65535 ||
        shared_bytes > function.shared_bytes)
        return INVALID_VALUE;
    if (launch->num_attributes != starts_early(function)) return INVALID_VALUE;
    if (launch->num_attributes && (launch->attributes->id != 6 || launch->attributes->number != 1))
        return INVALID_VALUE;  // PROGRAMMATIC_STREAM_SERIALIZATION
    const Kernel *kernel = function.kernel;
    const char *first = static_cast<const char *>(arguments[0]);
    const std::vector<char> copied(first, first + kernel->argument_bytes);
    counts["launches"]++;
    return enqueue(launch->stream, [=](std::string &report) {
        return run_kernel(*kernel, grid, block, shared_bytes, copied.data(), report);
    });
}

int cu_mem_alloc(void **out, size_t bytes) {
    Guard guard(lock);
    if (sticky) return sticky;
    if (const int status = forbid(RELAXED)) return status;
    if (allocated_bytes() + bytes > total_memory()) return OUT_OF_MEMORY;
    counts["allocations"]++;
    *out = allocate(bytes);
    return *out ? SUCCESS : OUT_OF_MEMORY;
}
int cu_mem_free(void *start) {
    Guard guard(lock);
    if (const int status = forbid(RELAXED)) return status;
    finish_all();
    std::string report;
    return release(start, report) ? sticky : fault(report);
}
int cu_mem_get_info(size_t *free, size_t *total) {
    *total = total_memory();
    *free = *total - std::min(*total, allocated_bytes());
    return SUCCESS;
}
int cu_mem_host_alloc(void **out, size_t bytes, unsigned) {
    Guard guard(lock);
    if (const int status = forbid(RELAXED)) return status;
    *out = aligned_alloc(64, (bytes + 63) / 64 * 64);
    pinned[static_cast<char *>(*out)] = bytes;
    return SUCCESS;
}
int cu_mem_free_host(void *start) {
    Guard guard(lock);
    pinned.erase(static_cast<char *>(start));
    free(start);
    return SUCCESS;
}

int cu_memcpy_to_device(void *to, const void *from, size_t bytes, void *stream) {
    Guard guard(lock);
    if (is_pinned(from)) return enqueue(stream, copy(to, from, bytes, true, false));
    if (stream_of(stream)->capturing) return CAPTURE_UNSUPPORTED;
    const std::vector<char> staged(static_cast<const char *>(from), static_cast<const char *>(from) + bytes);
    return enqueue(stream, [=](std::string &report) { return copy(to, staged.data(), bytes, true, false)(report); });
}
int cu_memcpy_to_host(void *to, const void *from, size_t bytes, void *stream) {
    Guard guard(lock);
    if (!is_pinned(to) && stream_of(stream)->capturing) return CAPTURE_UNSUPPORTED;
    const int status = enqueue(stream, copy(to, from, bytes, false, true));
    return status || is_pinned(to) ? status : finish(stream_of(stream));
}
int cu_memcpy_device(void *to, const void *from, size_t bytes, void *stream) {
    Guard guard(lock);
    return enqueue(stream, copy(to, from, bytes, true, true));
}
int cu_memset(void *to, unsigned char value, size_t bytes, void *stream) {
    Guard guard(lock);
    return enqueue(stream, [=](std::string &report) {
        if (bytes && !is_device_memory(to, bytes)) {
            report = "memset: access to " + describe(to);
            return false;
        }
        write_memory(to, bytes, [=] { memset(to, value, bytes); });
        return true;
    });
}

int cu_stream_create(void **out, unsigned) {
    Guard guard(lock);
    Stream *stream = new Stream;
    streams.insert(stream);
    *out = stream;
    return SUCCESS;
}
int cu_stream_synchronize(void *stream) {
    Guard guard(lock);
    return finish(stream_of(stream));
}
int cu_stream_wait_event(void *, void *event, unsigned) {
    Guard guard(lock);
    return wait_event(static_cast<Event *>(event));
}
int cu_stream_destroy(void *handle) {
    Guard guard(lock);
    Stream *stream = stream_of(handle);
    const int status = finish(stream);
    streams.erase(stream);
    delete stream;
    return status;
}
int cu_stream_is_capturing(void *stream, int *status) {
    *status = stream_of(stream)->capturing;
    return SUCCESS;
}
int cu_stream_begin_capture(void *stream, int mode) {
    Guard guard(lock);
    if (stream_of(stream) == &default_stream || stream_of(stream)->capturing) return CAPTURE_UNSUPPORTED;
    stream_of(stream)->capturing = true;
    stream_of(stream)->invalid = false;
    stream_of(stream)->mode = mode;
    stream_of(stream)->captured = {};
    return SUCCESS;
}
int cu_stream_end_capture(void *stream, void **graph) {
    Guard guard(lock);
    if (!stream_of(stream)->capturing) return CAPTURE_UNSUPPORTED;
    stream_of(stream)->capturing = false;
    if (stream_of(stream)->invalid) return CAPTURE_INVALIDATED;
    *graph = new Graph(std::move(stream_of(stream)->captured));
    return SUCCESS;
}
int cu_graph_instantiate(void **executable, void *graph, unsigned long long) {
    *executable = new Graph(*static_cast<Graph *>(graph));
    return SUCCESS;
}
int cu_graph_launch(void *executable, void *stream) {
    Guard guard(lock);
    counts["graph launches"]++;
    for (const Work &work : static_cast<Graph *>(executable)->nodes) enqueue(stream, work);
    return sticky;
}
int cu_graph_upload(void *, void *) { return SUCCESS; }
int cu_graph_destroy(void *graph) {
    Guard guard(lock);
    finish_all();
    delete static_cast<Graph *>(graph);
    return SUCCESS;
}

int cu_event_create(void **out, unsigned) {
    *out = new Event;
    return SUCCESS;
}
int cu_event_record(void *event, void *stream) {
    Guard guard(lock);
    *static_cast<Event *>(event) = {stream_of(stream), stream_of(stream)->queued};
    return SUCCESS;
}
int cu_event_synchronize(void *event) {
    Guard guard(lock);
    return wait_event(static_cast<Event *>(event));
}
int cu_event_query(void *handle) {
    Guard guard(lock);
    const Event *event = static_cast<Event *>(handle);
    return event->stream && event->stream->done < event->after ? NOT_READY : SUCCESS;
}
int cu_event_destroy(void *event) {
    delete static_cast<Event *>(event);
    return SUCCESS;
}

int cu_get_error(int status, const char **text) {
    static std::map<int, std::string> texts;
    Guard guard(lock);
    const bool ours = status == ILLEGAL_ADDRESS || status == NOT_FOUND;
    texts[status] = status == OUT_OF_MEMORY ? "out of memory" : ours ? last_report : "CUDA error " + std::to_string(status);
    *text = texts[status].c_str();
    return SUCCESS;
}

// Unused by what we run, yet somebody's code names them.
int cu_not_emulated() { return INVALID_VALUE; }

// The pool's memory comes and goes in the order of its stream, in graphs too.
void emulated_given(void *block, void *stream) {
    Guard guard(lock);
    enqueue(stream, [=](std::string &report) { return give(block, report); });
}
void emulated_taken_back(void *block, void *stream) {
    Guard guard(lock);
    enqueue(stream, [=](std::string &report) { return take_back(block, report); });
}

// How often this thread made something happen: "launches", "graph launches", "allocations"; bytes of device memory "bytes".
uint64_t emulated_count(const char *what) {
    Guard guard(lock);
    return what == std::string("bytes") ? allocated_bytes() : counts[what];
}

void *emulated_driver(const char *name) {
    static const std::map<std::string, void *> functions = {
#define AS(name, function) {#name, reinterpret_cast<void *>(function)}
        AS(cuInit, cu_init), AS(cuDriverGetVersion, cu_driver_get_version), AS(cuDeviceGet, cu_device_get), AS(cuDeviceGetCount, cu_device_get_count),
        AS(cuDeviceGetName, cu_device_get_name), AS(cuDeviceGetAttribute, cu_device_get_attribute),
        AS(cuDevicePrimaryCtxRetain, cu_ctx_retain), AS(cuDevicePrimaryCtxRelease_v2, cu_ctx_release),
        AS(cuCtxGetCurrent, cu_ctx_get_current), AS(cuCtxSetCurrent, cu_ctx_set_current),
        AS(cuCtxSynchronize, cu_ctx_synchronize), AS(cuCtxDestroy_v2, cu_ctx_destroy),
        AS(cuModuleLoad, cu_not_emulated), AS(cuModuleLoadData, cu_module_load_data),
        AS(cuModuleGetFunction, cu_module_get_function), AS(cuModuleUnload, cu_module_unload),
        AS(cuFuncSetAttribute, cu_func_set_attribute), AS(cuLaunchKernel, cu_not_emulated),
        AS(cuLaunchKernelEx, cu_launch_kernel_ex),
        AS(cuMemAlloc_v2, cu_mem_alloc), AS(cuMemFree_v2, cu_mem_free), AS(cuMemGetInfo_v2, cu_mem_get_info),
        AS(cuMemHostAlloc, cu_mem_host_alloc), AS(cuMemFreeHost, cu_mem_free_host),
        AS(cuMemcpyHtoDAsync_v2, cu_memcpy_to_device), AS(cuMemcpyDtoHAsync_v2, cu_memcpy_to_host),
        AS(cuMemcpyDtoDAsync_v2, cu_memcpy_device), AS(cuMemcpyPeerAsync, cu_not_emulated),
        AS(cuMemsetD8Async, cu_memset), AS(cuStreamCreate, cu_stream_create),
        AS(cuStreamSynchronize, cu_stream_synchronize), AS(cuStreamWaitEvent, cu_stream_wait_event),
        AS(cuStreamDestroy_v2, cu_stream_destroy), AS(cuStreamIsCapturing, cu_stream_is_capturing),
        AS(cuStreamBeginCapture_v2, cu_stream_begin_capture), AS(cuStreamEndCapture, cu_stream_end_capture),
        AS(cuGraphInstantiateWithFlags, cu_graph_instantiate), AS(cuGraphLaunch, cu_graph_launch),
        AS(cuGraphUpload, cu_graph_upload), AS(cuGraphDestroy, cu_graph_destroy),
        AS(cuGraphExecDestroy, cu_graph_destroy), AS(cuEventCreate, cu_event_create),
        AS(cuEventRecord, cu_event_record), AS(cuEventSynchronize, cu_event_synchronize),
        AS(cuEventQuery, cu_event_query), AS(cuEventDestroy_v2, cu_event_destroy),
        AS(cuGetErrorName, cu_get_error), AS(cuGetErrorString, cu_get_error),
#undef AS
    };
    const auto found = functions.find(name);
    return found == functions.end() ? nullptr : found->second;
}

}  // extern "C"
