// Linear layers for many rows: the sums of linear.cu, in the same order, with x and W staged in shared
// memory while the tensor cores work on what came before.
#include "weights.cuh"

// A stage is a chunk of columns; so eight lanes that read rows g and g + 1 of it find them in different banks.
constexpr int UNITS = CHUNK / 8;  // of 16 bytes in a row of a stage

// A block's share of `out`, and of its shared memory. A warp makes PANELS × TILES tiles of it.
template <int FORMAT, int PANELS_, int TILES_, int OUT_WARPS_, int ROW_WARPS, int STAGES_>
struct Tiling {
    static constexpr int PANELS = PANELS_, TILES = TILES_, OUT_WARPS = OUT_WARPS_, STAGES = STAGES_;
    static constexpr int THREADS = OUT_WARPS * ROW_WARPS * WARP;
    static constexpr int OUTS = OUT_WARPS * PANELS * PANEL, ROWS = ROW_WARPS * TILES * 8;
    static constexpr int PANEL_UNITS = FORMAT == DENSE ? PANEL * UNITS : chunk_bytes(FORMAT) / 16;
    static constexpr int W_UNITS = OUTS / PANEL * PANEL_UNITS, X_UNITS = ROWS * UNITS;
    static constexpr int STAGE = W_UNITS + X_UNITS;
};

// The stages, as numbers of several sizes.
struct Stages {
    Shared<uint4> units;
    Shared<uint2> pairs;
    Shared<uint32_t> words;
};

// Rows of a matrix from `first` on.
struct Rows {
    const void *matrix;  // [rows, cols]
    uint32_t first, rows, cols;
};

// Begins to copy a chunk of COUNT rows; rows and columns beyond the matrix's ends are zeros.
template <typename T, int THREADS, int COUNT>
__device__ inline void copy_rows(const Shared<uint4> &to, int start, const Rows &given, uint32_t column) {
    const auto [matrix, first, rows, cols] = given;
    const T *from = static_cast<const T *>(matrix) + size_t(first) * cols;
    const uint32_t at = column + threadIdx.x % UNITS * 8, own = threadIdx.x / UNITS;
#pragma unroll
    for (int row = 0; row < COUNT; row += THREADS / UNITS) {
        static_assert(COUNT % (THREADS / UNITS) == 0, "whole rounds: the next part of the stage is not ours");
        const bool inside = first + row + own < rows && at < cols;
        copy16_async(to, start + row * UNITS + threadIdx.x, from + ((row + own) * cols + at), inside);
    }
}

// Begins to copy a chunk of packed panels.
template <int FORMAT, int THREADS, int PANELS>
__device__ inline void copy_panels(const Shared<uint4> &to, int start, const LinearArgs &args, uint32_t first,
                                   uint32_t column) {
    constexpr int BYTES = chunk_bytes(FORMAT), PANEL_UNITS = BYTES / 16;
    const uint32_t chunks = args.cols / CHUNK, panels = (args.outs + PANEL - 1) / PANEL;
    const unsigned char *packed = static_cast<const unsigned char *>(args.weight);
    for (int i = threadIdx.x; i < PANELS * PANEL_UNITS; i += THREADS) {
        const uint32_t panel = first + i / PANEL_UNITS;
        const size_t at = (size_t(panel) * chunks + column / CHUNK) * BYTES + i % PANEL_UNITS * 16;
        copy16_async(to, start + i, packed + (panel < panels ? at : 0), panel < panels);
    }
}

// A lane's part of a stage's panel.
template <int FORMAT>
__device__ inline Stored<FORMAT> staged(const Stages &stages, int start, int panel) {
    const int lane = threadIdx.x % WARP, g = lane / 4;
    Stored<FORMAT> stored = {};
    if constexpr (FORMAT == DENSE) {
        stored.upper = stages.units[start + panel * PANEL * UNITS + lane];
        stored.lower = stages.units[start + panel * PANEL * UNITS + WARP + lane];
        return stored;
    }
    const int unit = start + panel * chunk_bytes(FORMAT) / 16;
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

// Begins to copy the stage of a column.
template <typename T, int FORMAT, typename Block>
__device__ inline void begin_stage(const Shared<uint4> &to, const LinearArgs &args, uint32_t column) {
    constexpr int THREADS = Block::THREADS;
    const uint32_t first_row = blockIdx.x * Block::ROWS, first_out = blockIdx.y * Block::OUTS;
    const int start = column / CHUNK % Block::STAGES * Block::STAGE;
    if (column < args.cols) {
        const Rows weights = {args.weight, first_out, args.outs, args.cols};
        const Rows x = {args.x, first_row, args.rows, args.cols};
        if constexpr (FORMAT == DENSE) copy_rows<T, THREADS, Block::OUTS>(to, start, weights, column);
        else copy_panels<FORMAT, THREADS, Block::OUTS / PANEL>(to, start, args, first_out / PANEL, column);
        copy_rows<T, THREADS, Block::ROWS>(to, start + Block::W_UNITS, x, column);
    }
    copy_commit();
}

// sums += W · xᵀ of a tile; at the end of a slice, total += sums and sums = 0.
template <bool ENDS, typename T, int FORMAT>
__device__ inline void multiply_tile(float (&total)[4], float (&sums)[4], const Chunk<T, FORMAT> &weights,
                                     const Operand &x) {
    weights.add_to(sums, x);
#pragma unroll
    for (int i = 0; ENDS && i < 4; i++) {
        total[i] += sums[i];
        sums[i] = 0.0f;
    }
}

// The tiles of a stage. Registers suffice for all of x and one panel, which is right where reading a panel costs
// moves, or for all panels and one tile of x, where unpacking one costs more.
template <typename T, int FORMAT, typename Block, bool ENDS, int PANELS, int TILES>
__device__ inline void multiply_stage(float (&total)[PANELS][TILES][4], float (&sums)[PANELS][TILES][4],
                                      const Stages &stages, int start, int panel, int row) {
    const auto x_of = [&](int tile) {
        const int unit = start + Block::W_UNITS + (row + tile * 8) * UNITS;
        return operand<T, FORMAT>(uint4(stages.units[unit + threadIdx.x % WARP]));
    };
    const auto weights_of = [&](int i) { return unpack<T, FORMAT>(staged<FORMAT>(stages, start, panel + i)); };
    if constexpr (FORMAT == DENSE) {
        Operand x[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) x[tile] = x_of(tile);
#pragma unroll
        for (int i = 0; i < PANELS; i++) {
            const Chunk<T, FORMAT> weights = weights_of(i);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
                multiply_tile<ENDS>(total[i][tile], sums[i][tile], weights, x[tile]);
        }
    } else {
        Chunk<T, FORMAT> weights[PANELS];
#pragma unroll
        for (int i = 0; i < PANELS; i++) weights[i] = weights_of(i);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const Operand x = x_of(tile);
#pragma unroll
            for (int i = 0; i < PANELS; i++) multiply_tile<ENDS>(total[i][tile], sums[i][tile], weights[i], x);
        }
    }
}

// A warp's totals to the block's [ROWS][OUTS] in shared memory; from there whole rows go out.
template <typename T, typename Block, int PANELS, int TILES>
__device__ inline void store_block(const LinearArgs &args, const float (&total)[PANELS][TILES][4], int panel, int row) {
    constexpr int WIDTH = Block::OUTS + 4;
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const Shared<float> block = SharedBytes().take<float>(Block::ROWS * WIDTH);
#pragma unroll
    for (int i = 0; i < PANELS * TILES * 4; i++) {
        const int each = i / 4 / TILES, tile = i / 4 % TILES, part = i % 4;
        block[(row + tile * 8 + 2 * t + part % 2) * WIDTH + (panel + each) * PANEL + g + 8 * (part / 2)] =
            total[each][tile][part];
    }
    __syncthreads();
    const uint32_t first_row = blockIdx.x * Block::ROWS, first_out = blockIdx.y * Block::OUTS;
    for (int y = threadIdx.x / WARP; y < Block::ROWS && first_row + y < args.rows; y += Block::THREADS / WARP) {
#pragma unroll
        for (int x = lane; x < Block::OUTS; x += WARP)
            if (first_out + x < args.outs) store_out<T>(args, first_row + y, first_out + x, block[y * WIDTH + x]);
    }
}

// Grid: blocks of x's rows × blocks of W's. Those that run together have few rows of W between them, so that W,
// the larger one, is read from memory once.
template <typename T, int FORMAT, typename Block>
__device__ void gemm(const LinearArgs &args) {
    constexpr int STAGES = Block::STAGES, STAGE = Block::STAGE;
    const int warp = threadIdx.x / WARP;
    const int panel = warp % Block::OUT_WARPS * Block::PANELS, row = warp / Block::OUT_WARPS * Block::TILES * 8;
    const Stages stages = {SharedBytes().take<uint4>(STAGES * STAGE), SharedBytes().take<uint2>(STAGES * STAGE * 2),
                           SharedBytes().take<uint32_t>(STAGES * STAGE * 4)};
    const auto begin = [&](uint32_t column) { begin_stage<T, FORMAT, Block>(stages.units, args, column); };
    float total[Block::PANELS][Block::TILES][4] = {}, sums[Block::PANELS][Block::TILES][4] = {};
    for (int stage = 0; stage < STAGES - 1; stage++) begin(stage * CHUNK);
    int next = 0;                // stage to multiply
    uint32_t left = args.slice;  // columns of the slice
    for (uint32_t column = 0; column < args.cols; column += CHUNK) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // the copies are there for all, and all have left the stage that is filled next
        begin(column + (STAGES - 1) * CHUNK);
        const int start = next;
        next = next == (STAGES - 1) * STAGE ? 0 : next + STAGE;
        left -= CHUNK;
        if (left == 0 || column + CHUNK >= args.cols) {
            multiply_stage<T, FORMAT, Block, true>(total, sums, stages, start, panel, row);
            left = args.slice;
        } else {
            multiply_stage<T, FORMAT, Block, false>(total, sums, stages, start, panel, row);
        }
    }
    copy_wait<0>();
    __syncthreads();
    store_block<T, Block>(args, total, panel, row);
}

// Blocks of 128 rows of x and 192 of W, or 128 where these are unpacked as well; and of 64 × 64.
#define GEMM_KERNELS(T, name, FORMAT)                                               \
    KERNEL(gemm_##T##_##name##_128, LinearArgs, 8 * WARP) {                         \
        gemm<T, FORMAT, Tiling<FORMAT, FORMAT == DENSE ? 3 : 2, 8, 4, 2, 4>>(args); \
    }                                                                               \
    KERNEL(gemm_##T##_##name##_64, LinearArgs, 4 * WARP) { gemm<T, FORMAT, Tiling<FORMAT, 2, 4, 2, 2, 6>>(args); }
FOR_EACH_FORMAT(GEMM_KERNELS)
