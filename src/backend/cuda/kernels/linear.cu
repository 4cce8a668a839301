// Linear layers for few rows: out = x · Wᵀ + bias, at the speed at which W can be read.
//
// The columns are cut into slices. The sum of a slice is made by the tensor cores in ascending order,
// the sum of the slices is taken in ascending order: so an element of `out` does not depend on how many
// rows there are, nor on how slices are dealt to warps, nor on whether this kernel or gemm.cu makes it.
#include "weights.cuh"

constexpr int LINEAR_WARPS = 16;
constexpr int TILE_ROWS = 8;  // of x's rows, in a tensor-core tile
constexpr int TILE = PANEL * TILE_ROWS;
constexpr int UNROLL = 4;     // chunks on their way at once

// Where a lane finds its part of a panel of W.
template <typename T, int FORMAT>
struct Panel {
    const unsigned char *numbers, *scales;

    __device__ Panel(const LinearArgs &args, uint32_t panel) {
        const int lane = threadIdx.x % WARP;
        const size_t chunks = args.cols / CHUNK;
        const unsigned char *start = static_cast<const unsigned char *>(args.weight);
        start += panel * chunks * chunk_bytes(FORMAT);
        numbers = start + lane * (FORMAT == Q8_0 ? 16 : 8);
        scales = start + (FORMAT == Q8_0 ? 512 : 256) + lane / 4 * 4;
    }

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
};

template <typename T>
struct Panel<T, DENSE> {
    const T *upper, *lower;

    __device__ Panel(const LinearArgs &args, uint32_t panel) {
        const uint32_t row = panel * PANEL + threadIdx.x % WARP / 4, lane = threadIdx.x % 4;
        const T *weight = static_cast<const T *>(args.weight) + 8 * lane;
        upper = weight + size_t(min(row, args.outs - 1)) * args.cols;
        lower = weight + size_t(min(row + 8, args.outs - 1)) * args.cols;
    }

    __device__ Stored<DENSE> load(uint32_t column) const {
        return {load_once(reinterpret_cast<const uint4 *>(upper + column)),
                load_once(reinterpret_cast<const uint4 *>(lower + column)), 0, 0};
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

// Adds W[panel, start … end] · x[8 · TILES rows]ᵀ to `sums`. `last` is the last column from which x has eight:
// beyond the end, where the weights are zeros, those are read, so that no load waits for a branch.
template <typename T, int FORMAT, int TILES>
__device__ inline void multiply_slice(float (&sums)[TILES][4], const Panel<T, FORMAT> &panel,
                                      const T *const (&x)[TILES], uint32_t start, uint32_t end, uint32_t last) {
    for (; start < end; start += UNROLL * CHUNK) {
        Stored<FORMAT> stored[UNROLL];
#pragma unroll
        for (int chunk = 0; chunk < UNROLL; chunk++) {
            // A lane is outside alone only where rows end within a chunk, which packed ones do not.
            const uint32_t column = start + chunk * CHUNK, own = FORMAT == DENSE ? 8 * (threadIdx.x % 4) : 0;
            stored[chunk] = Stored<FORMAT>{};
            if (column + own < end) stored[chunk] = panel.load(column);
        }
#pragma unroll
        for (int chunk = 0; chunk < UNROLL; chunk++) {
            const Chunk<T, FORMAT> weights = unpack<T, FORMAT>(stored[chunk]);
            const uint32_t column = min(start + chunk * CHUNK + 8 * (threadIdx.x % 4), last);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
                weights.add_to(sums[tile], operand<T, FORMAT>(load16(x[tile] + column)));
        }
    }
}

// Block: 16 rows of W and 8 · TILES rows of x. Each warp takes every warps-th slice; after each round the
// round's sums are added to the total in the order of the slices.
template <typename T, int FORMAT, int TILES>
__device__ void linear(const LinearArgs &args) {
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const uint32_t first_out = blockIdx.x * PANEL, first_row = blockIdx.y * TILE_ROWS * TILES;
    SharedBytes memory;
    const Shared<float> total = memory.take<float>(TILES * TILE);
    const Shared<float> partial = memory.take<float>(warps * TILES * TILE);
    for (int i = threadIdx.x; i < TILES * TILE; i += blockDim.x) total[i] = 0.0f;

    const Panel<T, FORMAT> panel(args, blockIdx.x);
    const T *x_rows[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        // Rows that do not exist have the last one's numbers. Nobody looks at their sums.
        const uint32_t row = min(first_row + tile * TILE_ROWS + threadIdx.x % WARP / 4, args.rows - 1);
        x_rows[tile] = static_cast<const T *>(args.x) + size_t(row) * args.cols;
    }
    const uint32_t slices = (args.cols + args.slice - 1) / args.slice;
    for (uint32_t round = 0; round < slices; round += warps) {
        const uint32_t slice = round + warp;
        if (slice < slices) {
            float sums[TILES][4] = {};
            const uint32_t end = min((slice + 1) * args.slice, args.cols);
            multiply_slice<T, FORMAT, TILES>(sums, panel, x_rows, slice * args.slice, end, args.cols - 8);
            store_tiles<TILES>(partial, warp * TILES * TILE, sums);
        }
        __syncthreads();
        const int count = min(slices - round, uint32_t(warps));
        for (int i = threadIdx.x; i < TILES * TILE; i += blockDim.x) {
            float sum = total[i];
            for (int each = 0; each < count; each++) sum += partial[each * TILES * TILE + i];
            total[i] = sum;
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < TILES * TILE; i += blockDim.x) {
        const uint32_t row = first_row + i / PANEL, out = first_out + i % PANEL;
        if (row < args.rows && out < args.outs) store_out<T>(args, row, out, total[i]);
    }
}

#define LINEAR_KERNELS(T, name, FORMAT)                                                                   \
    KERNEL(linear_##T##_##name##_1, LinearArgs, LINEAR_WARPS *WARP) { linear<T, FORMAT, 1>(args); }       \
    KERNEL(linear_##T##_##name##_2, LinearArgs, LINEAR_WARPS *WARP) { linear<T, FORMAT, 2>(args); }       \
    KERNEL(linear_##T##_##name##_4, LinearArgs, LINEAR_WARPS *WARP) { linear<T, FORMAT, 4>(args); }       \
    KERNEL(linear_##T##_##name##_8, LinearArgs, LINEAR_WARPS *WARP) { linear<T, FORMAT, 8>(args); }
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
