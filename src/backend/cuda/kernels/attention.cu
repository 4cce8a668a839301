// Paged causal attention, for rows that decode and rows of prompts alike.
//
// The queries of one key/value head that belong to one sequence, heads of the group innermost, are cut
// into tiles of 16: the rows of a tensor-core tile. Keys are cut into splits of SPLIT. A block goes over
// one split of a tile (then `merge` puts the splits together) or over all of them; either way each split
// has a softmax of its own, and splits are merged in ascending order. So a row's result does not depend
// on which of the two it was, nor on the other rows (Dao, FlashAttention-2, 2023, has the online softmax).
#include "common.cuh"

constexpr int ATTENTION_WARPS = 4;
constexpr int ATTENTION_THREADS = ATTENTION_WARPS * WARP;
constexpr int ATTENTION_ROWS = 16;
constexpr int KV_PAGE = 16;
constexpr int SPLIT = 256;
constexpr int KEYS = ATTENTION_WARPS * KV_PAGE;  // of a step: a page for each warp
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
    const void *keys, *values;  // [pages, kv_heads, KV_PAGE, dim], [pages, kv_heads, dim, KV_PAGE]
    void *out;                  // [rows, heads * dim]
    float *partial;             // [partials, kv_heads, ATTENTION_ROWS, dim + 2]: sums, maximum, total weight
    const uint32_t *positions;  // [rows]
    const uint32_t *blocks;     // block tables
    const uint32_t *items;      // [*num_items] AttentionItem (or MergeItem)
    const uint32_t *num_items;
    uint32_t heads, kv_heads, dim, width;
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

// What a block of CHUNKS · 32 ≥ dim columns keeps in registers.
template <typename T, int CHUNKS>
struct Tile {
    uint4 query[CHUNKS][2];      // rows g and g + 8, columns 32c + 8t …
    uint32_t position[2];        // of these rows
    bool exists[2];
    float sums[CHUNKS][4];       // of this warp's columns: 8 · CHUNKS from 8 · CHUNKS · warp
    Softmax softmax[2];
};

template <typename T, int CHUNKS>
__device__ inline void load_queries(Tile<T, CHUNKS> &tile, const AttentionArgs &args, const AttentionItem &item) {
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
            tile.query[chunk][half] = query.exists && column < args.dim ? load16(from + column) : uint4{0, 0, 0, 0};
        }
    }
}

// Products of the 16 queries with the 16 keys of a page. Lane t of score tile j has keys 4t + 2j, 4t + 2j + 1,
// so that `add_values` finds four neighbours in each lane.
template <typename T, int CHUNKS>
__device__ inline void score(float (&scores)[2][4], const Tile<T, CHUNKS> &tile, const T *page, uint32_t dim) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const uint32_t column = 32 * chunk + 8 * t;
        const uint4 q0 = tile.query[chunk][0], q1 = tile.query[chunk][1];
        const uint32_t low[4] = {q0.x, q1.x, q0.y, q1.y}, high[4] = {q0.z, q1.z, q0.w, q1.w};
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int key = 4 * (g / 2) + 2 * j + g % 2;
            const uint4 k = column < dim ? load16(page + key * dim + column) : uint4{0, 0, 0, 0};
            const uint32_t first[2] = {k.x, k.y}, second[2] = {k.z, k.w};
            mma<T>(scores[j], low, first);
            mma<T>(scores[j], high, second);
        }
    }
}

// Scales, and hides keys from queries that may not see them. `key` is the first one of this warp's page.
template <typename T, int CHUNKS>
__device__ inline void mask(float (&scores)[2][4], const Tile<T, CHUNKS> &tile, const AttentionArgs &args,
                            uint32_t key) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t at = key + 4 * t + 2 * j + i % 2, position = tile.position[i / 2];
            const bool seen = tile.exists[i / 2] && at <= position && (!args.window || at + args.window > position);
            scores[j][i] = seen ? scores[j][i] * args.scale : -INFINITY;
        }
    }
}

// Greatest (or sum, in a fixed order) of a row's scores in this warp's page, for rows g and g + 8.
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

// Four values of one column, those of keys from `hidden` on as zeros: what lies there may be anything.
template <typename T>
__device__ inline uint2 load_values(const T *values, uint32_t hidden) {
    uint2 found = *reinterpret_cast<const uint2 *>(values);
    if (hidden < 4) {
        if (hidden <= 0) found.x = 0;
        else if (hidden == 1) found.x &= 0xffff;
        if (hidden <= 2) found.y = 0;
        else found.y &= 0xffff;
    }
    return found;
}

// Adds weights · values of one page to this warp's columns. `seen` keys of the page exist.
template <typename T, int CHUNKS>
__device__ inline void add_values(Tile<T, CHUNKS> &tile, const uint4 &weights, const T *page, uint32_t dim,
                                  uint32_t seen) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, warp = threadIdx.x / WARP;
    const uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w};
    const uint32_t hidden = seen > uint32_t(4 * t) ? seen - 4 * t : 0;
#pragma unroll
    for (int each = 0; each < CHUNKS; each++) {
        const uint32_t column = 8 * (CHUNKS * warp + each) + g;
        const uint2 v = column < dim ? load_values(page + column * KV_PAGE + 4 * t, hidden) : uint2{0, 0};
        const uint32_t b[2] = {v.x, v.y};
        mma<T>(tile.sums[each], a, b);
    }
}

struct AttentionShared {
    Shared<float> maxima, totals;  // [warps, ATTENTION_ROWS]
    Shared<uint4> weights;         // [warps, lanes]: what the tensor cores take
};

// One step: KEYS keys from `key`, of which those before `end` exist.
template <typename T, int CHUNKS>
__device__ inline void attend(Tile<T, CHUNKS> &tile, const AttentionArgs &args, const AttentionItem &item,
                              const AttentionShared &shared, uint32_t key, uint32_t end) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, warp = threadIdx.x / WARP;
    const uint32_t own = key + warp * KV_PAGE;
    const size_t page_size = size_t(args.dim) * KV_PAGE;
    const uint32_t *table = args.blocks + item.blocks;
    float scores[2][4] = {};
    if (own < end) {
        const size_t page = size_t(table[own / KV_PAGE]) * args.kv_heads + blockIdx.y;
        score<T, CHUNKS>(scores, tile, static_cast<const T *>(args.keys) + page * page_size, args.dim);
    }
    mask(scores, tile, args, own);
    const float2 greatest = row_max(scores);
    if (t == 0) {
        shared.maxima[warp * ATTENTION_ROWS + g] = greatest.x;
        shared.maxima[warp * ATTENTION_ROWS + g + 8] = greatest.y;
    }
    __syncthreads();
    float maximum[2], fade[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        maximum[half] = tile.softmax[half].maximum;
        for (int each = 0; each < ATTENTION_WARPS; each++)
            maximum[half] = fmaxf(maximum[half], shared.maxima[each * ATTENTION_ROWS + g + 8 * half]);
        const bool any = maximum[half] != -INFINITY;
        fade[half] = any ? power_of_two(tile.softmax[half].maximum - maximum[half]) : 1.0f;
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++)
                scores[j][i] = any ? power_of_two(scores[j][i] - maximum[half]) : 0.0f;
        }
    }
    const float2 total = row_sum(scores);
    if (t == 0) {
        shared.totals[warp * ATTENTION_ROWS + g] = total.x;
        shared.totals[warp * ATTENTION_ROWS + g + 8] = total.y;
    }
    shared.weights[threadIdx.x] = uint4{pack2<T>(scores[0][0], scores[0][1]), pack2<T>(scores[0][2], scores[0][3]),
                                        pack2<T>(scores[1][0], scores[1][1]), pack2<T>(scores[1][2], scores[1][3])};
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = 0.0f;
        for (int each = 0; each < ATTENTION_WARPS; each++) sum += shared.totals[each * ATTENTION_ROWS + g + 8 * half];
        tile.softmax[half].weight = fmaf(tile.softmax[half].weight, fade[half], sum);
        tile.softmax[half].maximum = maximum[half];
    }
#pragma unroll
    for (int each = 0; each < CHUNKS; each++) {
#pragma unroll
        for (int i = 0; i < 4; i++) tile.sums[each][i] *= fade[i / 2];
    }
    for (int each = 0; each < ATTENTION_WARPS && key + each * KV_PAGE < end; each++) {
        const uint32_t start = key + each * KV_PAGE;
        const size_t page = size_t(table[start / KV_PAGE]) * args.kv_heads + blockIdx.y;
        const uint4 weights = shared.weights[each * WARP + threadIdx.x % WARP];
        add_values(tile, weights, static_cast<const T *>(args.values) + page * page_size, args.dim, end - start);
    }
}

// Calls `visit(row of the tile, half, column, index of the sum)` for each sum that this thread holds.
template <int CHUNKS, typename Visit>
__device__ inline void for_each_sum(uint32_t dim, Visit visit) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, warp = threadIdx.x / WARP;
#pragma unroll
    for (int each = 0; each < CHUNKS; each++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t column = 8 * (CHUNKS * warp + each) + 2 * t + i % 2;
            if (column < dim) visit(g + 8 * (i / 2), i / 2, column, each, i);
        }
    }
}

template <typename T>
__device__ inline T *out_of(const AttentionArgs &args, const Query &query) {
    return static_cast<T *>(args.out) + (size_t(query.row) * args.heads + query.head) * args.dim;
}

// What the item leaves: a finished row, or a partial one.
template <typename T, int CHUNKS>
__device__ inline void store(const Tile<T, CHUNKS> &tile, const AttentionArgs &args, const AttentionItem &item) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    if (item.partial == WHOLE) {
        for_each_sum<CHUNKS>(args.dim, [&](int row, int half, uint32_t column, int each, int i) {
            const uint32_t index = item.tile * ATTENTION_ROWS + row;
            const Query query = query_of(args, item.first_row, item.rows, index, blockIdx.y);
            if (query.exists)
                out_of<T>(args, query)[column] = from_float<T>(tile.sums[each][i] / tile.softmax[half].weight);
        });
        return;
    }
    const uint32_t stride = args.dim + 2;
    float *partial = args.partial + (size_t(item.partial) * args.kv_heads + blockIdx.y) * ATTENTION_ROWS * stride;
    for_each_sum<CHUNKS>(args.dim, [&](int row, int half, uint32_t column, int each, int i) {
        if (tile.exists[half]) partial[row * stride + column] = tile.sums[each][i];
    });
    if (threadIdx.x < WARP && t < 2) {
        float *end = partial + (g + 8 * t) * stride + args.dim;
        end[0] = tile.softmax[t].maximum;
        end[1] = tile.softmax[t].weight;
    }
}

// The first key that some query of the tile sees.
template <typename T, int CHUNKS>
__device__ inline uint32_t first_key(const AttentionArgs &args, const AttentionItem &item) {
    if (!args.window) return 0;
    const uint32_t group = args.heads / args.kv_heads;
    const uint32_t position = args.positions[item.first_row + item.tile * ATTENTION_ROWS / group];
    return position + 1 > args.window ? position + 1 - args.window : 0;
}

template <typename T, int CHUNKS>
__device__ void attention_item(const AttentionArgs &args, const AttentionItem &item, const AttentionShared &shared) {
    Tile<T, CHUNKS> tile = {};
    load_queries(tile, args, item);
    const uint32_t group = args.heads / args.kv_heads;
    const uint32_t last_row = min(((item.tile + 1) * ATTENTION_ROWS - 1) / group, item.rows - 1);
    const uint32_t end = args.positions[item.first_row + last_row] + 1;
    const uint32_t begin = first_key<T, CHUNKS>(args, item);
    Tile<T, CHUNKS> whole = tile;
    whole.softmax[0] = whole.softmax[1] = {-INFINITY, 0.0f};
    for (uint32_t split = item.first_split; split <= item.last_split; split++) {
        tile.softmax[0] = tile.softmax[1] = {-INFINITY, 0.0f};
#pragma unroll
        for (int each = 0; each < CHUNKS; each++) {
#pragma unroll
            for (int i = 0; i < 4; i++) tile.sums[each][i] = 0.0f;
        }
        const uint32_t stop = min((split + 1) * SPLIT, end);
        for (uint32_t key = split * SPLIT; key < stop; key += KEYS)
            if (key + KEYS > begin) attend(tile, args, item, shared, key, stop);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 factors = merge_softmax(whole.softmax[half], tile.softmax[half]);
#pragma unroll
            for (int each = 0; each < CHUNKS; each++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++)
                    whole.sums[each][i] = merge_sums(whole.sums[each][i], tile.sums[each][i], factors);
            }
        }
    }
    store(whole, args, item);
}

// Grid: any number of blocks, which share the items, × key/value heads.
template <typename T, int CHUNKS>
__device__ void attention(const AttentionArgs &args) {
    SHARED(float, maxima, ATTENTION_WARPS * ATTENTION_ROWS);
    SHARED(float, totals, ATTENTION_WARPS * ATTENTION_ROWS);
    SHARED(uint4, weights, ATTENTION_THREADS);
    const AttentionShared shared{maxima, totals, weights};
    const AttentionItem *items = reinterpret_cast<const AttentionItem *>(args.items);
    for (uint32_t at = blockIdx.x; at < *args.num_items; at += gridDim.x) {
        const AttentionItem item = items[at];
        attention_item<T, CHUNKS>(args, item, shared);
    }
}

#define ATTENTION(T, chunks) \
    KERNEL(attention_##T##_##chunks, AttentionArgs, ATTENTION_THREADS) { attention<T, chunks>(args); }

ATTENTION(f16, 1)
ATTENTION(f16, 2)
ATTENTION(f16, 3)
ATTENTION(f16, 4)
ATTENTION(f16, 6)
ATTENTION(f16, 8)
ATTENTION(bf16, 1)
ATTENTION(bf16, 2)
ATTENTION(bf16, 3)
ATTENTION(bf16, 4)
ATTENTION(bf16, 6)
ATTENTION(bf16, 8)

// Puts the partial results of a tile's splits together, in ascending order.
template <typename T>
__device__ void merge(const AttentionArgs &args) {
    const MergeItem *items = reinterpret_cast<const MergeItem *>(args.items);
    const uint32_t stride = args.dim + 2;
    const size_t size = size_t(args.kv_heads) * ATTENTION_ROWS * stride;
    for (uint32_t at = blockIdx.x; at < *args.num_items; at += gridDim.x) {
        const MergeItem item = items[at];
        const float *first = args.partial + item.partial * size + size_t(blockIdx.y) * ATTENTION_ROWS * stride;
        for (uint32_t i = threadIdx.x; i < ATTENTION_ROWS * args.dim; i += ATTENTION_THREADS) {
            const uint32_t row = i / args.dim, column = i % args.dim;
            const uint32_t index = item.tile * ATTENTION_ROWS + row;
            const Query query = query_of(args, item.first_row, item.rows, index, blockIdx.y);
            if (!query.exists) continue;
            Softmax whole = {-INFINITY, 0.0f};
            float sum = 0.0f;
            for (uint32_t split = 0; split < item.count; split++) {
                const float *partial = first + split * size + row * stride;
                const float2 factors = merge_softmax(whole, {partial[args.dim], partial[args.dim + 1]});
                sum = merge_sums(sum, partial[column], factors);
            }
            out_of<T>(args, query)[column] = from_float<T>(sum / whole.weight);
        }
    }
}

KERNEL(merge_f16, AttentionArgs, ATTENTION_THREADS) { merge<f16>(args); }
KERNEL(merge_bf16, AttentionArgs, ATTENTION_THREADS) { merge<bf16>(args); }

constexpr int MAX_COLUMNS = 256 / WARP;

// f32 without tensor cores: a warp goes over all keys of one query, 32 at a time.
__device__ inline void attend_exactly(const AttentionArgs &args, const AttentionItem &item, const Query &query) {
    SHARED(float, q, 256);
    const int lane = threadIdx.x;
    const uint32_t dim = args.dim, position = args.positions[query.row];
    const float *from = static_cast<const float *>(args.qkv) + size_t(query.row) * args.width + query.head * dim;
    __syncwarp();
    for (uint32_t i = lane; i < dim; i += WARP) q[i] = from[i];
    __syncwarp();
    const uint32_t begin = args.window && position + 1 > args.window ? position + 1 - args.window : 0;
    Softmax softmax = {-INFINITY, 0.0f};
    float sums[MAX_COLUMNS] = {};
    for (uint32_t key = begin / WARP * WARP; key <= position; key += WARP) {
        const uint32_t own = key + lane;
        float score = -INFINITY;
        if (own >= begin && own <= position) {
            const size_t page = size_t(args.blocks[item.blocks + own / KV_PAGE]) * args.kv_heads + blockIdx.y;
            const float *k = static_cast<const float *>(args.keys) + (page * KV_PAGE + own % KV_PAGE) * dim;
            float product = 0.0f;
            for (uint32_t i = 0; i < dim; i++) product = fmaf(q[i], k[i], product);
            score = product * args.scale;
        }
        const float maximum = fmaxf(softmax.maximum, warp_max(score));
        const float fade = power_of_two(softmax.maximum - maximum), weight = power_of_two(score - maximum);
        softmax = {maximum, fmaf(softmax.weight, fade, warp_sum(weight))};
        for (int each = 0; each < MAX_COLUMNS; each++) sums[each] *= fade;
        for (int other = 0; other < WARP && key + other <= position; other++) {
            const uint32_t at = key + other;
            const float its = __shfl_sync(ALL_LANES, weight, other);
            if (at < begin) continue;
            const size_t page = size_t(args.blocks[item.blocks + at / KV_PAGE]) * args.kv_heads + blockIdx.y;
            const float *v = static_cast<const float *>(args.values) + page * dim * KV_PAGE + at % KV_PAGE;
#pragma unroll
            for (int each = 0; each < MAX_COLUMNS; each++) {
                const uint32_t column = lane + WARP * each;
                if (column < dim) sums[each] = fmaf(its, v[column * KV_PAGE], sums[each]);
            }
        }
    }
    float *out = out_of<float>(args, query);
#pragma unroll
    for (int each = 0; each < MAX_COLUMNS; each++) {
        const uint32_t column = lane + WARP * each;
        if (column < dim) out[column] = sums[each] / softmax.weight;
    }
}

KERNEL(attention_f32, AttentionArgs, WARP) {
    const AttentionItem *items = reinterpret_cast<const AttentionItem *>(args.items);
    for (uint32_t at = blockIdx.x; at < *args.num_items; at += gridDim.x) {
        const AttentionItem item = items[at];
        for (uint32_t i = 0; i < ATTENTION_ROWS; i++) {
            const uint32_t index = item.tile * ATTENTION_ROWS + i;
            const Query query = query_of(args, item.first_row, item.rows, index, blockIdx.y);
            if (query.exists) attend_exactly(args, item, query);
        }
    }
}
