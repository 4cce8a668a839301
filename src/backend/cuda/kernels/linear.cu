// Linear layers for few rows: out = x · Wᵀ + bias, at the speed at which W can be read.
//
// The columns are cut into slices. The sum of a slice is made by the tensor cores in ascending order,
// the sum of the slices is taken in ascending order: so an element of `out` does not depend on how many
// rows there are, nor on how slices are dealt to warps, nor on whether this kernel or gemm.cu makes it.
#include "weights.cuh"

constexpr int TILE_ROWS = 8;  // of x's rows, in a tensor-core tile
constexpr int TILE = PANEL * TILE_ROWS;
constexpr int STEP_CHUNKS = 4;  // of W, that a lane holds or waits for at any time
constexpr int LINEAR_STEP = STEP_CHUNKS * CHUNK;

// Where a lane finds its part of a panel of W.
template <typename T, int FORMAT>
struct Panel {
    const unsigned char *numbers, *scales;
    uint32_t cols;

    __device__ Panel(const LinearArgs &args) : cols(args.cols) {
        const int lane = threadIdx.x % WARP;
        const size_t chunks = args.cols / CHUNK;
        const unsigned char *start = static_cast<const unsigned char *>(args.weight);
        start += blockIdx.x * chunks * chunk_bytes(FORMAT);
        numbers = start + lane * (FORMAT == Q8_0 ? 16 : 8);
        scales = start + (FORMAT == Q8_0 ? 512 : 256) + lane / 4 * 4;
    }

    __device__ bool has(uint32_t column) const { return column < cols; }

    __device__ Stored<FORMAT> load(uint32_t column) const {
        const size_t at = size_t(column / CHUNK) * chunk_bytes(FORMAT);
        Stored<FORMAT> stored = {};
        if (FORMAT == Q8_0) {
            stored.upper = load_once(reinterpret_cast<const uint4 *>(numbers + at));
        } else {
            const uint2 both = load_once(reinterpret_cast<const uint2 *>(numbers + at));
            stored.upper.x = both.x;
            stored.upper.y = both.y;
        }
        stored.scales = load_once(reinterpret_cast<const uint32_t *>(scales + at));
        if (FORMAT == Q4_1) stored.minima = load_once(reinterpret_cast<const uint32_t *>(scales + at + 32));
        return stored;
    }

    // Has a step brought to the second cache.
    __device__ void prefetch(uint32_t column) const {
        const int lane = threadIdx.x % WARP, place = lane * (FORMAT == Q8_0 ? 16 : 8);
        const size_t at = size_t(column / CHUNK) * chunk_bytes(FORMAT) + lane * LINE;
        const size_t end = size_t(min(column + LINEAR_STEP, cols) / CHUNK) * chunk_bytes(FORMAT);
        if (at < end) prefetch_line(numbers - place + at);
    }
};

template <typename T>
struct Panel<T, DENSE> {
    const T *upper, *lower;  // null: the lower rows are zeros
    uint32_t cols;

    __device__ static const T *row(const LinearArgs &args, uint32_t row) {
        return static_cast<const T *>(args.weight) + size_t(min(row, args.outs - 1)) * args.cols;
    }

    __device__ Panel(const LinearArgs &args) : cols(args.cols) {
        const uint32_t first = blockIdx.x * args.block_outs + threadIdx.x % WARP / 4, lane = threadIdx.x % 4;
        upper = row(args, first) + 8 * lane;
        lower = args.lower ? row(args, first + args.lower) + 8 * lane : nullptr;
    }

    // A lane may be alone beyond the last column.
    __device__ bool has(uint32_t column) const { return column + 8 * (threadIdx.x % 4) < cols; }

    __device__ Stored<DENSE> load(uint32_t column) const {
        Stored<DENSE> stored = {};
        stored.upper = load_once(reinterpret_cast<const uint4 *>(upper + column));
        if (lower) stored.lower = load_once(reinterpret_cast<const uint4 *>(lower + column));
        return stored;
    }

    // The four lanes that have a row take its two lines, and those of the lower row.
    __device__ void prefetch(uint32_t column) const {
        const uint32_t lane = threadIdx.x % 4, at = column + lane % 2 * LINE / sizeof(T);
        const T *start = lane < 2 ? upper : lower;
        if (at < cols && start) prefetch_line(start - 8 * lane + at);
    }
};

// `partial` takes the sums of a warp's slice, [TILES][8 rows of x][16 rows of W].
template <int TILES>
__device__ inline void store_tiles(const Shared<float> &partial, int at, const float (&sums)[TILES][4]) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            partial[at + tile * TILE + (2 * t + i % 2) * PANEL + g + 8 * (i / 2)] = sums[tile][i];
    }
}

// A panel of W, and what a lane has of it: the chunks of a step, or their loads under way.
template <typename T, int FORMAT>
struct Held {
    Panel<T, FORMAT> panel;
    Stored<FORMAT> stored[STEP_CHUNKS];

    // A step from `column`; beyond the last column zeros.
    __device__ void load(uint32_t column) {
        const bool whole = column + LINEAR_STEP <= panel.cols;
#pragma unroll
        for (int chunk = 0; chunk < STEP_CHUNKS; chunk++) {
            stored[chunk] = Stored<FORMAT>{};
            if (whole || panel.has(column + chunk * CHUNK)) stored[chunk] = panel.load(column + chunk * CHUNK);
        }
    }
};

// Adds W[panel, slice] · x[8 · TILES rows]ᵀ to `sums`. `weights` has the slice's first step, and is left with
// that of `next_slice`: as soon as a step has been used, the next one is loaded, in the same registers. Beyond the
// last column, where the weights are zeros, x's last eight are read, so that no load waits for a branch.
template <typename T, int FORMAT, int TILES>
__device__ inline void multiply_slice(float (&sums)[TILES][4], Held<T, FORMAT> &weights,
                                      const T *const (&x)[TILES], const LinearArgs &args, uint32_t slice,
                                      uint32_t next_slice) {
    const uint32_t end = min((slice + 1) * args.slice, args.cols);
    for (uint32_t start = slice * args.slice; start < end; start += LINEAR_STEP) {
        const uint32_t next = start + LINEAR_STEP < end ? start + LINEAR_STEP : next_slice * args.slice;
#pragma unroll
        for (int chunk = 0; chunk < STEP_CHUNKS; chunk++) {
            const Chunk<T, FORMAT> unpacked = unpack<T, FORMAT>(weights.stored[chunk]);
            const uint32_t column = min(start + chunk * CHUNK + 8 * (threadIdx.x % 4), args.cols - 8);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
                unpacked.add_to(sums[tile], operand<T, FORMAT>(load16(x[tile] + column)));
        }
        weights.load(next);
    }
}

// The block's part of `out`, from total[8 · TILES rows of x][16 rows of W].
template <typename T, int TILES>
__device__ inline void store_total(const LinearArgs &args, const Shared<float> &total) {
    for (int i = threadIdx.x; i < TILES * TILE; i += blockDim.x) {
        const uint32_t row = i / PANEL, lower = i % PANEL / 8, out = blockIdx.x * args.block_outs + i % 8;
        if (row >= args.rows || (lower && args.lower != 8)) continue;
        if (args.lower > 8) store_gated<T>(args, row, out, total[i], total[i + 8]);
        else if (out + 8 * lower < args.outs) store_out<T>(args, row, out + 8 * lower, total[i]);
    }
}

// Block: a tensor-core tile's rows of W and 8 · TILES rows of x. Each warp takes every warps-th slice; after
// each `slots` of them their sums are added to the total in the order of the slices. The slice after a warp's next
// is on its way to the second cache: more might not stay there, and would be in front of x.
template <typename T, int FORMAT, int TILES>
__device__ void linear(const LinearArgs &args) {
    const uint32_t warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const uint32_t slices = (args.cols + args.slice - 1) / args.slice;
    Held<T, FORMAT> weights = {Panel<T, FORMAT>(args), {}};
    weights.load(warp * args.slice);
    weights.panel.prefetch((warp + warps) * args.slice);
    await_previous();

    SharedBytes memory;
    const Shared<float> total = memory.take<float>(TILES * TILE);
    const Shared<float> partial = memory.take<float>(args.slots * TILES * TILE);
    for (int i = threadIdx.x; i < TILES * TILE; i += blockDim.x) total[i] = 0.0f;
    const T *x_rows[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        // Rows that do not exist have the last one's numbers. Nobody looks at their sums.
        const uint32_t row = min(tile * TILE_ROWS + threadIdx.x % WARP / 4, args.rows - 1);
        x_rows[tile] = static_cast<const T *>(args.x) + size_t(row) * args.cols;
    }
    uint32_t slice = warp;
    for (uint32_t round = 0; round < slices; round += args.slots) {
        const uint32_t count = min(slices - round, args.slots);
        for (; slice < round + count; slice += warps) {
            weights.panel.prefetch((slice + 2 * warps) * args.slice);
            float sums[TILES][4] = {};
            multiply_slice<T, FORMAT, TILES>(sums, weights, x_rows, args, slice, slice + warps);
            store_tiles<TILES>(partial, (slice - round) * TILES * TILE, sums);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < TILES * TILE; i += blockDim.x) {
            float sum = total[i];
            for (uint32_t each = 0; each < count; each++) sum += partial[each * TILES * TILE + i];
            total[i] = sum;
        }
        __syncthreads();
    }
    store_total<T, TILES>(args, total);
}

// Of each: rows of x in tiles, most warps, and blocks of so many that a multiprocessor should have room for.
#define LINEAR_KERNEL(T, name, FORMAT, tiles, warps, blocks)                                \
    EAGER_KERNEL(linear_##T##_##name##_##tiles, LinearArgs, (warps) * WARP, blocks) {       \
        linear<T, FORMAT, tiles>(args);                                                     \
    }
#define LINEAR_KERNELS(T, name, FORMAT)                                                     \
    LINEAR_KERNEL(T, name, FORMAT, 1, 14, 2) LINEAR_KERNEL(T, name, FORMAT, 2, 14, 2)       \
    LINEAR_KERNEL(T, name, FORMAT, 4, 12, 1) LINEAR_KERNEL(T, name, FORMAT, 8, 12, 1)
FOR_EACH_FORMAT(LINEAR_KERNELS)

constexpr int EXACT_WARPS = 4;

// f32 without tensor cores, which would round: a warp for each row of W, eight rows of x.
KERNEL(linear_f32, LinearArgs, EXACT_WARPS *WARP) {
    const uint32_t out = blockIdx.x * EXACT_WARPS + threadIdx.x / WARP, first_row = blockIdx.y * TILE_ROWS;
    const int lane = threadIdx.x % WARP;
    const uint32_t count = min(args.rows - first_row, uint32_t(TILE_ROWS));
    const float *w = static_cast<const float *>(args.weight) + size_t(min(out, args.outs - 1)) * args.cols;
    const float *x = static_cast<const float *>(args.x) + size_t(first_row) * args.cols;
    float sums[TILE_ROWS] = {};
    for (uint32_t column = lane; column < args.cols; column += WARP) {
        const float value = w[column];
#pragma unroll
        for (uint32_t row = 0; row < TILE_ROWS; row++)
            if (row < count) sums[row] = fmaf(value, x[size_t(row) * args.cols + column], sums[row]);
    }
#pragma unroll
    for (uint32_t row = 0; row < TILE_ROWS; row++) {
        const float sum = warp_sum(sums[row]);
        if (lane == 0 && row < count && out < args.outs) store_out<float>(args, first_row + row, out, sum);
    }
}
