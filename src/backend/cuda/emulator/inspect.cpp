// What tests and launchers ask of the emulated device itself.
#include "device.h"

using namespace emulated;

extern "C" {

// What the device reports of a kernel of broken.cu: null when nothing.
const char *emulated_report_of(const char *kernel) {
    static std::string report;
    const size_t bytes = 64 * sizeof(float);
    void *data = allocate(bytes), *freed = allocate(bytes);
    write_memory(data, bytes, [=] { memset(data, 0, bytes); });
    release(freed, report);
    const void *arguments[] = {data, freed};
    const Kernel *found = find_kernel(kernel);
    report = found ? "" : "there is no such kernel";
    bool well = found && run_kernel(*found, {2, 1, 1}, {64, 1, 1}, 0, arguments, report);
    std::string overrun;
    if (!release(data, overrun) && well) {
        well = false;
        report = overrun;
    }
    return well ? nullptr : report.c_str();
}

// Bytes of a kernel's argument; 0: there is no such kernel.
size_t emulated_argument_bytes(const char *kernel) {
    const Kernel *found = find_kernel(kernel);
    return found ? found->argument_bytes : 0;
}

LaunchBounds emulated_launch_bounds(const char *kernel) {
    const Kernel *found = find_kernel(kernel);
    return found ? found->bounds : LaunchBounds{0, 0};
}

}  // extern "C"
