// What tests and launchers ask of the emulated device itself.
#include "device.h"

using namespace emulated;

extern "C" {

// What the device reports of a kernel of broken.cu, which is given two blocks of the pool: null when nothing.
const char *emulated_report_of(const char *kernel, void *data, void *freed) {
    static std::string report;
    Guard guard(lock);
    finish(&default_stream);
    const size_t bytes = 64 * sizeof(float);
    write_memory(data, bytes, [=] { memset(data, 0, bytes); });
    const void *arguments[] = {data, freed};
    const Kernel *found = find_kernel(kernel);
    report = found ? "" : "there is no such kernel";
    const bool well = found && run_kernel(*found, {2, 1, 1}, {64, 1, 1}, 0, arguments, report);
    if (well) report.clear();
    std::string overrun;
    if (!take_back(data, overrun) && well) report = overrun;
    return report.empty() ? nullptr : report.c_str();
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
