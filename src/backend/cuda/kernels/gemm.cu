// Linear layers for many rows: the sums of linear.cu, in the same order, with x and W staged in shared
// memory while the tensor cores work on what came before.
#include "weights.cuh"

constexpr int STAGES = 3;
constexpr int STEP = 64;            // columns of a stage: two chunks
constexpr int UNITS = STEP / 8;     // of 16 bytes in a row of a stage

// A block's share of `out`, and of its shared memory. Its warps stand two by two or four by two.
template <typename T, int FORMAT, int PANELS, int TILES, int OUT_WARPS, int ROW_WARPS>
struct Tiling {
    static constexpr int THREADS = OUT_WARPS * ROW_WARPS * WARP;
    static constexpr int OUTS = OUT_WARPS * PANELS * PANEL, ROWS = ROW_WARPS * TILES * 8;
    static constexpr int PANEL_UNITS = FORMAT == DENSE ? PANEL * UNITS : 2 * chunk_bytes(FORMAT) / 16;
    static constexpr int W_UNITS = OUTS / PANEL * PANEL_UNITS, X_UNITS = ROWS * UNITS;
};

// The stages, as numbers of several sizes.
struct Stages {
    Shared<uint4> units;
    Shared<uint2> pairs;
    Shared<uint32_t> words;
};

// Where unit `unit` of row `row` of a stage lies: shuffled so that what a quarter of a warp reads at once,
// four units of two rows, lies in different banks.
__device__ inline int unit_at(int row, int unit) { return row * UNITS + (unit ^ (row % 2 * 4)); }

// Begins to copy 64 columns of `count` rows of a matrix; rows and columns beyond its ends are zeros.
template <typename T, int THREADS>
__device__ inline void copy_rows(const Shared<uint4> &to, int start, const void *from, uint32_t first,
                                 int count, uint32_t rows, uint32_t column, uint32_t cols) {
    const T *matrix = static_cast<const T *>(from);
    for (int i = threadIdx.x; i < count * UNITS; i += THREADS) {
        const uint32_t row = first + i / UNITS, at = column + i % UNITS * 8;
        const bool inside = row < rows && at < cols;
        const T *source = inside ? matrix + size_t(row) * cols + at : matrix;
        copy16_async(to, start + unit_at(i / UNITS, i % UNITS), source, inside);
    }
}

// Begins to copy two chunks of packed panels.
template <int FORMAT, int THREADS, int PANELS>
__device__ inline void copy_panels(const Shared<uint4> &to, int start, const LinearArgs &args, uint32_t first,
                                   uint32_t column) {
    constexpr int BYTES = chunk_bytes(FORMAT), PANEL_UNITS = 2 * BYTES / 16;
    const uint32_t chunks = args.cols / CHUNK, panels = (args.outs + PANEL - 1) / PANEL;
    const unsigned char *packed = static_cast<const unsigned char *>(args.weight);
    for (int i = threadIdx.x; i < PANELS * PANEL_UNITS; i += THREADS) {
        const uint32_t panel = first + i / PANEL_UNITS, byte = i % PANEL_UNITS * 16;
        const uint32_t chunk = column / CHUNK + byte / BYTES;
        const bool inside = panel < panels && chunk < chunks;
        const size_t at = inside ? (size_t(panel) * chunks + chunk) * BYTES + byte % BYTES : 0;
        copy16_async(to, start + i, packed + at, inside);
    }
}

// A lane's part of chunk `half` of a stage's panel.
template <int FORMAT>
__device__ inline Stored<FORMAT> staged(const Stages &stages, int start, int panel, int half) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    Stored<FORMAT> stored = {};
    if constexpr (FORMAT == DENSE) {
        stored.upper = stages.units[start + unit_at(panel * PANEL + g, half * 4 + t)];
        stored.lower = stages.units[start + unit_at(panel * PANEL + g + 8, half * 4 + t)];
        return stored;
    }
    const int unit = start + (2 * panel + half) * chunk_bytes(FORMAT) / 16;
    const int scales = (FORMAT == Q8_0 ? 512 : 256) / 4 + 4 * unit + g;
    if (FORMAT == Q8_0) {
        stored.upper = stages.units[unit + lane];
    } else {
        const uint2 both = stages.pairs[2 * unit + lane];
        stored.upper.x = both.x;
        stored.upper.y = both.y;
    }
    stored.scales = stages.words[scales];
    if (FORMAT == Q4_1) stored.minima = stages.words[scales + 8];
    return stored;
}

// sums[PANELS][TILES] += W · xᵀ over a stage.
template <typename T, int FORMAT, int PANELS, int TILES>
__device__ inline void multiply_stage(float (&sums)[PANELS][TILES][4], const Stages &stages, int w_start,
                                      int x_start, int panel, int row) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < STEP / CHUNK; half++) {
        Operand operands[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const uint4 x = stages.units[x_start + unit_at(row + tile * 8 + g, half * 4 + t)];
            operands[tile] = operand<T, FORMAT>(x);
        }
#pragma unroll
        for (int i = 0; i < PANELS; i++) {
            const Stored<FORMAT> stored = staged<FORMAT>(stages, w_start, panel + i, half);
            const Chunk<T, FORMAT> weights = unpack<T, FORMAT>(stored);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) weights.add_to(sums[i][tile], operands[tile]);
        }
    }
}

// total += sums; sums = 0
template <int PANELS, int TILES>
__device__ inline void end_slice(float (&total)[PANELS][TILES][4], float (&sums)[PANELS][TILES][4]) {
#pragma unroll
    for (int i = 0; i < PANELS * TILES * 4; i++) {
        float &sum = sums[i / 4 / TILES][i / 4 % TILES][i % 4];
        total[i / 4 / TILES][i / 4 % TILES][i % 4] += sum;
        sum = 0.0f;
    }
}

// A warp's totals to the block's [ROWS][OUTS] in shared memory; from there whole rows go out.
template <typename T, typename Tiling, int PANELS, int TILES>
__device__ inline void store_block(const LinearArgs &args, const float (&total)[PANELS][TILES][4], int panel, int row) {
    constexpr int WIDTH = Tiling::OUTS + 4;
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const Shared<float> block = SharedBytes().take<float>(Tiling::ROWS * WIDTH);
#pragma unroll
    for (int i = 0; i < PANELS * TILES * 4; i++) {
        const int each = i / 4 / TILES, tile = i / 4 % TILES, part = i % 4;
        block[(row + tile * 8 + 2 * t + part % 2) * WIDTH + (panel + each) * PANEL + g + 8 * (part / 2)] =
            total[each][tile][part];
    }
    __syncthreads();
    const uint32_t first_out = blockIdx.x * Tiling::OUTS, first_row = blockIdx.y * Tiling::ROWS;
    for (int i = threadIdx.x; i < Tiling::ROWS * Tiling::OUTS; i += Tiling::THREADS) {
        const int y = i / Tiling::OUTS, x = i % Tiling::OUTS;
        if (first_row + y < args.rows && first_out + x < args.outs)
            store_out<T>(args, first_row + y, first_out + x, block[y * WIDTH + x]);
    }
}

template <typename T, int FORMAT, int PANELS, int TILES, int OUT_WARPS, int ROW_WARPS>
__device__ void gemm(const LinearArgs &args) {
    using Tile = Tiling<T, FORMAT, PANELS, TILES, OUT_WARPS, ROW_WARPS>;
    constexpr int STAGE = Tile::W_UNITS + Tile::X_UNITS;
    const int warp = threadIdx.x / WARP;
    const int panel = warp % OUT_WARPS * PANELS, row = warp / OUT_WARPS * TILES * 8;  // of the block
    const uint32_t first_out = blockIdx.x * Tile::OUTS, first_row = blockIdx.y * Tile::ROWS;
    const Stages stages = {SharedBytes().take<uint4>(STAGES * STAGE), SharedBytes().take<uint2>(STAGES * STAGE * 2),
                           SharedBytes().take<uint32_t>(STAGES * STAGE * 4)};
    const auto begin = [&](uint32_t step) {
        const int start = step % STAGES * STAGE;
        if (step * STEP < args.cols) {
            if constexpr (FORMAT == DENSE)
                copy_rows<T, Tile::THREADS>(stages.units, start, args.weight, first_out, Tile::OUTS, args.outs, step * STEP,
                                            args.cols);
            else
                copy_panels<FORMAT, Tile::THREADS, Tile::OUTS / PANEL>(stages.units, start, args, first_out / PANEL,
                                                                       step * STEP);
            copy_rows<T, Tile::THREADS>(stages.units, start + Tile::W_UNITS, args.x, first_row, Tile::ROWS, args.rows,
                                        step * STEP, args.cols);
        }
        copy_commit();
    };
    float total[PANELS][TILES][4] = {}, sums[PANELS][TILES][4] = {};
    for (int step = 0; step < STAGES - 1; step++) begin(step);
    for (uint32_t step = 0; step * STEP < args.cols; step++) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // the copies are there for all, and all have left the stage that is filled next
        begin(step + STAGES - 1);
        const int start = step % STAGES * STAGE;
        multiply_stage<T, FORMAT, PANELS, TILES>(sums, stages, start, start + Tile::W_UNITS, panel, row);
        if ((step + 1) * STEP % args.slice == 0) end_slice<PANELS, TILES>(total, sums);
    }
    end_slice<PANELS, TILES>(total, sums);
    copy_wait<0>();
    __syncthreads();
    store_block<T, Tile, PANELS, TILES>(args, total, panel, row);
}

// Blocks of 128 × 128 and of 64 × 64.
#define GEMM_KERNELS(T, name, FORMAT)                                                                    \
    KERNEL(gemm_##T##_##name##_128, LinearArgs, 8 * WARP) { gemm<T, FORMAT, 4, 4, 2, 4>(args); }         \
    KERNEL(gemm_##T##_##name##_64, LinearArgs, 4 * WARP) { gemm<T, FORMAT, 2, 4, 2, 2>(args); }
FOR_EACH_FORMAT(GEMM_KERNELS)
