// Paged causal attention, for rows that decode and rows of prompts alike: what attention.cu, where a
// block works on one tile, and prefill.cu, where each of its warps has a tile of its own, have in common.
//
// The queries of one key/value head that belong to one sequence, heads of the group innermost, are cut
// into tiles of 16: the rows of a tensor-core tile. Keys are cut into splits of SPLIT. A block goes over
// one split of a tile (then `merge` puts the splits together) or over all of them; either way each split
// has a softmax of its own, and splits are merged in ascending order. So a row's result does not depend
// on which of the two it was, nor on the kernel, nor on the other rows. The online softmax is that of Dao,
// FlashAttention-2, 2023.
#pragma once

#include "common.cuh"

constexpr int ATTENTION_WARPS = 4;
constexpr int ATTENTION_THREADS = ATTENTION_WARPS * WARP;
constexpr int ATTENTION_ROWS = 16;
constexpr int KV_PAGE = 16;
constexpr int SPLIT = 256;
constexpr int PAGES = 4;  // of a step, whose scores are weighed together
constexpr int STEP_KEYS = PAGES * KV_PAGE;
constexpr uint32_t WHOLE = 0xffffffffu;

// Work of a block.
struct AttentionItem {
    uint32_t first_row;  // of the sequence's run
    uint32_t rows;       // of the run
    uint32_t tile;       // of the run's queries
    uint32_t blocks;     // where the sequence's block table starts
    uint32_t first_split, last_split;  // inclusive
    uint32_t partial;    // where to leave what `merge` puts together; WHOLE: the item has all splits
};

// Work of a block of `merge`.
struct MergeItem {
    uint32_t first_row, rows, tile, partial, count;
};

struct AttentionArgs {
    const void *qkv;            // [rows, width]
    const void *keys, *values;  // [pages, kv_heads, KV_PAGE, page_dim], [pages, kv_heads, page_dim, KV_PAGE]
    void *out;                  // [rows, heads * dim]
    float *partial;             // [partials, kv_heads, ATTENTION_ROWS, dim + 2]: sums, maximum, total weight
    const uint32_t *positions;  // [rows]
    const uint32_t *blocks;     // block tables
    const uint32_t *items;      // [*num_items] AttentionItem (or MergeItem)
    const uint32_t *num_items;
    uint32_t heads, kv_heads, dim, width;
    uint32_t page_dim;          // dim, up to a multiple of 8: columns past it are zeros
    uint32_t window;            // keys that a query sees, itself included; 0: all
    float scale;                // on the products, log2(e) included
};

// The row and head of query `index` of a run, or false when there is none.
struct Query {
    uint32_t row, head;
    bool exists;
};

__device__ inline Query query_of(const AttentionArgs &args, uint32_t first_row, uint32_t rows, uint32_t index,
                                 uint32_t kv_head) {
    const uint32_t group = args.heads / args.kv_heads, row = index / group;
    return {first_row + row, kv_head * group + index % group, row < rows};
}

// A softmax in the making, for one row: weights are relative to 2^maximum.
struct Softmax {
    float maximum, weight;
};

__device__ inline float power_of_two(float x) { return exp2f(x); }

// Factors on what was summed before and on what is added, when both are put together in `into`.
__device__ inline float2 merge_softmax(Softmax &into, const Softmax &added) {
    if (added.maximum == -INFINITY) return make_float2(1.0f, 0.0f);
    const float maximum = fmaxf(into.maximum, added.maximum);
    const float old = power_of_two(into.maximum - maximum), fresh = power_of_two(added.maximum - maximum);
    into.weight = fmaf(into.weight, old, __fmul_rn(added.weight, fresh));
    into.maximum = maximum;
    return make_float2(old, fresh);
}

__device__ inline float merge_sums(float sum, float added, float2 factors) {
    return factors.y == 0.0f ? __fmul_rn(sum, factors.x) : fmaf(sum, factors.x, __fmul_rn(added, factors.y));
}

// What is kept in registers for heads of up to 32 · CHUNKS columns: SHARES warps share a tile, and have the
// sums of as many parts of 8 columns each.
template <typename T, int CHUNKS, int SHARES>
struct Tile {
    static constexpr int PARTS = 4 * CHUNKS / SHARES;
    uint32_t position[2];        // of rows g and g + 8
    bool exists[2];
    float sums[PARTS][4];
    Softmax softmax[2];

    __device__ static int first_part() { return PARTS * (threadIdx.x / WARP % SHARES); }

    __device__ void clear() {
        softmax[0] = softmax[1] = {-INFINITY, 0.0f};
#pragma unroll
        for (int i = 0; i < 4 * PARTS; i++) sums[i / 4][i % 4] = 0.0f;
    }

    // The sums of a split are put to those of the splits before.
    __device__ void merge(const Tile &split) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 factors = merge_softmax(softmax[half], split.softmax[half]);
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++)
                    sums[part][i] = merge_sums(sums[part][i], split.sums[part][i], factors);
            }
        }
    }
};

// Eight columns of a head from `column` on, those past its end as zeros.
template <typename T>
__device__ inline uint4 load_columns(const AttentionArgs &args, const T *head, uint32_t column) {
    if ((args.dim | args.width) % 8 == 0) return load16(head + column);
    T numbers[8];
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) numbers[i] = column + i < args.dim ? head[column + i] : from_float<T>(0.0f);
    uint4 found;
    memcpy(&found, numbers, sizeof(found));
    return found;
}

// Tells of the rows g and g + 8 of the tile, and has `keep(chunk, half, numbers)` keep the columns
// 32 · chunk + 8t … of their queries.
template <typename T, int CHUNKS, int SHARES, typename Keep>
__device__ inline void load_queries(Tile<T, CHUNKS, SHARES> &tile, const AttentionArgs &args, const AttentionItem &item,
                                    Keep keep) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t index = item.tile * ATTENTION_ROWS + g + 8 * half;
        const Query query = query_of(args, item.first_row, item.rows, index, blockIdx.y);
        tile.exists[half] = query.exists;
        tile.position[half] = query.exists ? args.positions[query.row] : 0;
        const T *from = static_cast<const T *>(args.qkv) + size_t(query.row) * args.width + query.head * args.dim;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const uint32_t column = 32 * chunk + 8 * t;
            keep(chunk, half, query.exists && column < args.dim ? load_columns(args, from, column) : uint4{0, 0, 0, 0});
        }
    }
}

// A lane's part of a page's keys, for score tile j: columns 32 · chunk + 8t … of one key, if it has them. `dim`: of
// the page, here and below.
__device__ inline bool has_key(uint32_t dim, int chunk) { return 32 * chunk + 8 * (threadIdx.x % 4) < dim; }
template <typename T>
__device__ inline const T *key_at(const T *page, uint32_t dim, int chunk, int j) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, key = 4 * (g / 2) + 2 * j + g % 2;
    return page + key * dim + 32 * chunk + 8 * t;
}
template <typename T>
__device__ inline uint4 load_key(const T *page, uint32_t dim, int chunk, int j) {
    return has_key(dim, chunk) ? load16(key_at(page, dim, chunk, j)) : uint4{0, 0, 0, 0};
}

// Adds products of the 16 queries with the 16 keys of a page, over a chunk of columns: `q0` and `q1` are of rows
// g and g + 8, `key(j)` gives what `load_key` does. Lane t of score tile j has keys 4t + 2j, 4t + 2j + 1, so that
// `add_values` finds four neighbours in each lane.
template <typename T, typename Key>
__device__ inline void score(float (&scores)[2][4], const uint4 &q0, const uint4 &q1, const Key &key) {
    const uint32_t low[4] = {q0.x, q1.x, q0.y, q1.y}, high[4] = {q0.z, q1.z, q0.w, q1.w};
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const uint4 k = key(j);
        const uint32_t first[2] = {k.x, k.y}, second[2] = {k.z, k.w};
        mma<T>(scores[j], low, first);
        mma<T>(scores[j], high, second);
    }
}

// Scales, and hides keys from queries that may not see them. `key` is the first one of the page.
template <typename T, int CHUNKS, int SHARES>
__device__ inline void mask(float (&scores)[2][4], const Tile<T, CHUNKS, SHARES> &tile, const AttentionArgs &args,
                            uint32_t key) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t at = key + 4 * t + 2 * j + i % 2, position = tile.position[i / 2];
            const bool seen = tile.exists[i / 2] && at <= position && (!args.window || at + args.window > position);
            // Never fused with what takes the maximum away: both kernels round here.
            scores[j][i] = seen ? __fmul_rn(scores[j][i], args.scale) : -INFINITY;
        }
    }
}

// Greatest (or sum, in a fixed order) of a row's scores in a page, for rows g and g + 8.
__device__ inline float2 row_max(const float (&scores)[2][4]) {
    float2 found = make_float2(fmaxf(fmaxf(scores[0][0], scores[0][1]), fmaxf(scores[1][0], scores[1][1])),
                               fmaxf(fmaxf(scores[0][2], scores[0][3]), fmaxf(scores[1][2], scores[1][3])));
    for (int step = 1; step < 4; step *= 2) {
        found.x = fmaxf(found.x, __shfl_xor_sync(ALL_LANES, found.x, step));
        found.y = fmaxf(found.y, __shfl_xor_sync(ALL_LANES, found.y, step));
    }
    return found;
}

__device__ inline float2 row_sum(const float (&scores)[2][4]) {
    float2 sum = make_float2((scores[0][0] + scores[0][1]) + (scores[1][0] + scores[1][1]),
                             (scores[0][2] + scores[0][3]) + (scores[1][2] + scores[1][3]));
    for (int step = 1; step < 4; step *= 2) {
        sum.x += __shfl_xor_sync(ALL_LANES, sum.x, step);
        sum.y += __shfl_xor_sync(ALL_LANES, sum.y, step);
    }
    return sum;
}

// Four values of one of the columns of the warp's `part`, in a page.
template <typename T>
__device__ inline uint2 load_values(const T *page, uint32_t dim, int part) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const uint32_t column = 8 * part + g;
    return column < dim ? *reinterpret_cast<const uint2 *>(page + column * KV_PAGE + 4 * t) : uint2{0, 0};
}

// Those of keys from `hidden` on as zeros: what lies there may be anything.
__device__ inline uint2 hide_values(uint2 found, uint32_t hidden) {
    if (hidden < 4) {
        if (hidden <= 0) found.x = 0;
        else if (hidden == 1) found.x &= 0xffff;
        if (hidden <= 2) found.y = 0;
        else found.y &= 0xffff;
    }
    return found;
}

// Adds weights · values of one page to the tile's columns. `seen` keys of the page exist. `values(part)`: what
// `load_values` gives for the tile's `part`.
template <typename T, int CHUNKS, int SHARES, typename Values>
__device__ inline void add_values(Tile<T, CHUNKS, SHARES> &tile, const uint4 &weights, uint32_t seen,
                                  const Values &values) {
    const int t = threadIdx.x % 4;
    const uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w};
    const uint32_t hidden = seen > uint32_t(4 * t) ? seen - 4 * t : 0;
#pragma unroll
    for (int part = 0; part < tile.PARTS; part++) {
        const uint2 v = hide_values(values(part), hidden);
        const uint32_t b[2] = {v.x, v.y};
        mma<T>(tile.sums[part], a, b);
    }
}

// Keys, or values, of this block's key/value head in a page of the cache.
template <typename T>
__device__ inline const T *page_at(const void *pages, const AttentionArgs &args, uint32_t page) {
    return static_cast<const T *>(pages) + (size_t(page) * args.kv_heads + blockIdx.y) * args.page_dim * KV_PAGE;
}

// The weights of four neighbouring keys, as the tensor cores take them.
template <typename T>
__device__ inline uint4 pack_weights(const float (&scores)[2][4]) {
    return uint4{pack2<T>(scores[0][0], scores[0][1]), pack2<T>(scores[0][2], scores[0][3]),
                 pack2<T>(scores[1][0], scores[1][1]), pack2<T>(scores[1][2], scores[1][3])};
}

// Scores → weights relative to a new maximum, and how what was summed before fades.
__device__ inline float weigh(float (&scores)[2][4], int half, float before, float maximum) {
    const bool any = maximum != -INFINITY;
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++)
            scores[j][i] = any ? power_of_two(scores[j][i] - maximum) : 0.0f;
    }
    return any ? power_of_two(before - maximum) : 1.0f;
}

// The last row of a tile, and the keys that its queries see: from `begin` (some of them) to `end`.
struct Reach {
    uint32_t begin, end;
};

__device__ inline Reach reach_of(const AttentionArgs &args, const AttentionItem &item) {
    const uint32_t group = args.heads / args.kv_heads;
    const uint32_t last_row = min(((item.tile + 1) * ATTENTION_ROWS - 1) / group, item.rows - 1);
    const uint32_t first = args.positions[item.first_row + item.tile * ATTENTION_ROWS / group] + 1;
    const uint32_t end = args.positions[item.first_row + last_row] + 1;
    return {args.window && first > args.window ? first - args.window : 0, end};
}

// Calls `visit(row of the tile, half, column, sum)` for each sum that this thread holds.
template <typename T, int CHUNKS, int SHARES, typename Visit>
__device__ inline void for_each_sum(const Tile<T, CHUNKS, SHARES> &tile, uint32_t dim, Visit visit) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int part = 0; part < tile.PARTS; part++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t column = 8 * (tile.first_part() + part) + 2 * t + i % 2;
            if (column < dim) visit(g + 8 * (i / 2), i / 2, column, tile.sums[part][i]);
        }
    }
}

template <typename T>
__device__ inline T *out_of(const AttentionArgs &args, const Query &query) {
    return static_cast<T *>(args.out) + (size_t(query.row) * args.heads + query.head) * args.dim;
}

// Finished rows.
template <typename T, int CHUNKS, int SHARES>
__device__ inline void store_rows(const Tile<T, CHUNKS, SHARES> &tile, const AttentionArgs &args,
                                  const AttentionItem &item) {
    for_each_sum(tile, args.dim, [&](int row, int half, uint32_t column, float sum) {
        const uint32_t index = item.tile * ATTENTION_ROWS + row;
        const Query query = query_of(args, item.first_row, item.rows, index, blockIdx.y);
        if (query.exists) out_of<T>(args, query)[column] = from_float<T>(sum / tile.softmax[half].weight);
    });
}
