// Linear layers for few rows: out = x · Wᵀ + bias, at the speed at which W can be read.
//
// The columns are cut into slices. The sum of a slice is made by the tensor cores in ascending order,
// the sum of the slices is taken in ascending order: so an element of `out` does not depend on how many
// rows there are, nor on how slices are dealt to warps.
#include "common.cuh"

struct LinearArgs {
    const void *weight;  // [outs, cols]
    const void *x;       // [rows, cols]
    const float *bias;   // [outs]; null: none
    void *out;           // [rows, outs], of x's type or f32
    uint32_t rows, cols, outs, slice, out_is_f32;
};

constexpr int LINEAR_WARPS = 16;
constexpr int TILE_OUTS = 16;   // of W's rows, in a block
constexpr int TILE_ROWS = 8;    // of x's rows, in a tensor-core tile
constexpr int TILE = TILE_OUTS * TILE_ROWS;
constexpr int CHUNK = 32;       // columns that a warp loads at once: 8 for each lane of a row
constexpr int UNROLL = 4;

// Adds W[16 rows, chunk] · x[8 · TILES rows, chunk]ᵀ to `sums`. Lane t of a row loads columns 8t … 8t + 7
// of both, so the tensor cores see the columns of a chunk in another order, the same one on both sides.
template <typename T, int TILES>
__device__ inline void multiply_chunk(float (&sums)[TILES][4], const T *const (&w)[2], const T *const (&x)[TILES],
                                      uint32_t column, bool inside) {
    const uint4 none = {0, 0, 0, 0};
    const uint4 w0 = inside ? load_once(w[0] + column) : none;
    const uint4 w1 = inside ? load_once(w[1] + column) : none;
    const uint32_t low[4] = {w0.x, w1.x, w0.y, w1.y}, high[4] = {w0.z, w1.z, w0.w, w1.w};
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const uint4 v = inside && x[tile] ? load16(x[tile] + column) : none;
        const uint32_t first[2] = {v.x, v.y}, second[2] = {v.z, v.w};
        mma<T>(sums[tile], low, first);
        mma<T>(sums[tile], high, second);
    }
}

// `partial` takes the sums of a warp's slice, [TILES][8 rows of x][16 rows of W].
template <int TILES>
__device__ inline void store_tiles(const Shared<float> &partial, int at, const float (&sums)[TILES][4]) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            partial[at + tile * TILE + (2 * t + i % 2) * TILE_OUTS + g + 8 * (i / 2)] = sums[tile][i];
    }
}

template <typename T>
__device__ inline void store_out(const LinearArgs &args, uint32_t row, uint32_t out, float sum) {
    const size_t at = size_t(row) * args.outs + out;
    if (args.bias) sum += args.bias[out];
    if (args.out_is_f32) static_cast<float *>(args.out)[at] = sum;
    else static_cast<T *>(args.out)[at] = from_float<T>(sum);
}

// Block: 16 rows of W and 8 · TILES rows of x. Each warp takes every warps-th slice; after each round the
// round's sums are added to the total in the order of the slices.
template <typename T, int TILES>
__device__ void linear(const LinearArgs &args) {
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const uint32_t first_out = blockIdx.x * TILE_OUTS, first_row = blockIdx.y * TILE_ROWS * TILES;
    SharedBytes memory;
    const Shared<float> total = memory.take<float>(TILES * TILE);
    const Shared<float> partial = memory.take<float>(warps * TILES * TILE);
    for (int i = threadIdx.x; i < TILES * TILE; i += blockDim.x) total[i] = 0.0f;

    const T *weight = static_cast<const T *>(args.weight), *x = static_cast<const T *>(args.x);
    const T *const w_rows[2] = {weight + size_t(min(first_out + g, args.outs - 1)) * args.cols,
                                weight + size_t(min(first_out + g + 8, args.outs - 1)) * args.cols};
    const T *x_rows[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const uint32_t row = first_row + tile * TILE_ROWS + g;
        x_rows[tile] = row < args.rows ? x + size_t(row) * args.cols : nullptr;
    }
    const uint32_t slices = (args.cols + args.slice - 1) / args.slice;
    for (uint32_t round = 0; round < slices; round += warps) {
        const uint32_t slice = round + warp;
        if (slice < slices) {
            float sums[TILES][4] = {};
            const uint32_t end = min((slice + 1) * args.slice, args.cols);
            for (uint32_t start = slice * args.slice; start < end; start += UNROLL * CHUNK) {
#pragma unroll
                for (int chunk = 0; chunk < UNROLL; chunk++) {
                    const uint32_t column = start + chunk * CHUNK + 8 * t;
                    multiply_chunk<T, TILES>(sums, w_rows, x_rows, column, column < end);
                }
            }
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
        const uint32_t row = first_row + i / TILE_OUTS, out = first_out + i % TILE_OUTS;
        if (row < args.rows && out < args.outs) store_out<T>(args, row, out, total[i]);
    }
}

KERNEL(linear_f16_1, LinearArgs, LINEAR_WARPS *WARP) { linear<f16, 1>(args); }
KERNEL(linear_f16_2, LinearArgs, LINEAR_WARPS *WARP) { linear<f16, 2>(args); }
KERNEL(linear_f16_4, LinearArgs, LINEAR_WARPS *WARP) { linear<f16, 4>(args); }
KERNEL(linear_f16_8, LinearArgs, LINEAR_WARPS *WARP) { linear<f16, 8>(args); }
KERNEL(linear_bf16_1, LinearArgs, LINEAR_WARPS *WARP) { linear<bf16, 1>(args); }
KERNEL(linear_bf16_2, LinearArgs, LINEAR_WARPS *WARP) { linear<bf16, 2>(args); }
KERNEL(linear_bf16_4, LinearArgs, LINEAR_WARPS *WARP) { linear<bf16, 4>(args); }
KERNEL(linear_bf16_8, LinearArgs, LINEAR_WARPS *WARP) { linear<bf16, 8>(args); }

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
