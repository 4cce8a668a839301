// The weights of a linear layer as operands of the tensor cores, 16 rows × 32 columns at a time.
//
// Lane 4g + t of a warp holds columns 8t … 8t + 7 of the rows g and g + 8, and of row g of x. So the tensor
// cores see the columns of a chunk in another order, the same one on both sides.
//
// Quantised weights are integers with a scale for each row and chunk, which is what their formats have too.
// The tensor cores multiply the integers, exactly; the sum of a chunk is scaled in f32.
#pragma once

#include "common.cuh"

struct LinearArgs {
    const void *weight;  // [outs, cols] of x's type, or packed
    const void *x;       // [rows, cols]
    const float *bias;   // [outs]; null: none
    void *out;           // [rows, outs], of x's type or f32
    uint32_t rows, cols, outs, slice, out_is_f32;
    // Of linear.cu: rows of W from a block to the next, and from the upper eight rows of a block's tile to the
    // lower ones; 0: there are none, more than 8: the upper rows are the gates of the lower.
    uint32_t block_outs, lower;
    uint32_t slots;  // slices whose sums wait in shared memory
};

// How weights are stored; of matrix.rs. Packed ones lie as [outs / 16][cols / 32] chunks: the numbers of
// lane 0, 1, …; then, for g in 0 … 7, the scales of rows g and g + 8; then so the minima.
enum Format { DENSE, Q8_0, Q4_0, Q4_1 };

constexpr int PANEL = 16;  // rows of W in an operand
constexpr int CHUNK = 32;  // columns

__host__ __device__ constexpr int chunk_bytes(int format) {
    return format == Q8_0 ? 512 + 32 : format == Q4_0 ? 256 + 32 : format == Q4_1 ? 256 + 64 : 0;
}

// A lane's part of 8 rows of x. `totals`: of the columns of the results, over the chunk.
struct Operand {
    uint32_t low[2], high[2];
    float totals[2];
};

template <typename T, int FORMAT>
__device__ inline Operand operand(const uint4 &x) {
    Operand operand = {{x.x, x.y}, {x.z, x.w}, {0.0f, 0.0f}};
    if (FORMAT == Q4_1) {
        const uint32_t one = pack2<T>(1.0f, 1.0f), ones[4] = {one, one, one, one};
        float sums[4] = {};
        mma<T>(sums, ones, operand.low);
        mma<T>(sums, ones, operand.high);
        operand.totals[0] = sums[0];
        operand.totals[1] = sums[1];
    }
    return operand;
}

// A lane's part of a chunk of W.
template <typename T, int FORMAT>
struct Chunk {
    uint32_t low[4], high[4];
    float scale[2], minimum[2];

    // sums[16 rows of W, 8 rows of x] += W · xᵀ
    __device__ void add_to(float (&sums)[4], const Operand &x) const {
        if constexpr (FORMAT == DENSE) {
            mma<T>(sums, low, x.low);
            mma<T>(sums, high, x.high);
            return;
        }
        float dots[4] = {};
        mma<T>(dots, low, x.low);
        mma<T>(dots, high, x.high);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sums[i] = fmaf(scale[i / 2], dots[i], sums[i]);
            if (FORMAT == Q4_1) sums[i] = fmaf(minimum[i / 2], x.totals[i % 2], sums[i]);
        }
    }
};

// A lane's part of a chunk as it is stored: rows g and g + 8 of DENSE, half as much of Q8_0, and so on.
template <int FORMAT>
struct Stored {
    uint4 upper, lower;
    uint32_t scales, minima;
};

// Two signed bytes from `byte` on, stored plus 128, as numbers.
template <typename T>
__device__ inline uint32_t bytes_at(uint32_t word, int byte) {
    // The byte in the last places of 2²³ counts ones.
    const float low = __uint_as_float(0x4b000000 | (word >> 8 * byte & 0xff));
    const float high = __uint_as_float(0x4b000000 | (word >> (8 * byte + 8) & 0xff));
    return pack2<T>(low - 8388736.0f, high - 8388736.0f);
}

template <typename T, int FORMAT>
__device__ inline Chunk<T, FORMAT> unpack(const Stored<FORMAT> &stored) {
    Chunk<T, FORMAT> chunk;
    const uint4 upper = stored.upper, lower = stored.lower;
    if constexpr (FORMAT == DENSE) {
        const uint32_t words[8] = {upper.x, lower.x, upper.y, lower.y, upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            chunk.low[i] = words[i];
            chunk.high[i] = words[4 + i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // Columns 2 · (i / 2) and the next of row g + 8 · (i % 2), and those four further on.
            if (FORMAT == Q8_0) {
                const uint32_t first = i % 2 ? upper.z : upper.x, second = i % 2 ? upper.w : upper.y;
                chunk.low[i] = bytes_at<T>(first, i / 2 * 2);
                chunk.high[i] = bytes_at<T>(second, i / 2 * 2);
            } else {
                const uint32_t eight = i % 2 ? upper.y : upper.x;
                const float zero = FORMAT == Q4_0 ? 8.0f : 0.0f;
                chunk.low[i] = small_integers<T>(eight >> i / 2 * 4 & 0x000f000f, zero);
                chunk.high[i] = small_integers<T>(eight >> (i / 2 * 4 + 8) & 0x000f000f, zero);
            }
        }
        const float2 scale = halves(stored.scales), minimum = halves(FORMAT == Q4_1 ? stored.minima : 0);
        chunk.scale[0] = scale.x;
        chunk.scale[1] = scale.y;
        chunk.minimum[0] = minimum.x;
        chunk.minimum[1] = minimum.y;
    }
    return chunk;
}

// What LinearArgs says of an element of `out`.
template <typename T>
__device__ inline void store_out(const LinearArgs &args, uint32_t row, uint32_t out, float sum) {
    const size_t at = size_t(row) * args.outs + out;
    if (args.bias) sum += args.bias[out];
    if (args.out_is_f32) static_cast<float *>(args.out)[at] = sum;
    else static_cast<T *>(args.out)[at] = from_float<T>(sum);
}

// An element of [rows, outs / 2] from two of `out`, rounded as if these had been stored.
template <typename T>
__device__ inline void store_gated(const LinearArgs &args, uint32_t row, uint32_t out, float gate, float up) {
    const uint32_t width = args.outs / 2;
    if (out >= width) return;
    if (args.bias) {
        gate += args.bias[out];
        up += args.bias[out + width];
    }
    static_cast<T *>(args.out)[size_t(row) * width + out] = gated(from_float<T>(gate), from_float<T>(up));
}

// KERNEL name(T, FORMAT) for each number type and format.
#define FOR_EACH_FORMAT(DEFINE)                                                      \
    DEFINE(f16, dense, DENSE) DEFINE(f16, q8_0, Q8_0) DEFINE(f16, q4_0, Q4_0)        \
    DEFINE(f16, q4_1, Q4_1) DEFINE(bf16, dense, DENSE) DEFINE(bf16, q8_0, Q8_0)      \
    DEFINE(bf16, q4_0, Q4_0) DEFINE(bf16, q4_1, Q4_1)
