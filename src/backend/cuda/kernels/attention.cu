// Attention where a block works on one tile: each warp takes a page of keys in turn, and a quarter of the
// columns of the values. For rows that decode; for others while they are few.
#include "attention.cuh"

static_assert(ATTENTION_WARPS == PAGES, "a page of a step for each warp");
constexpr int KEYS = PAGES * KV_PAGE;  // of a step

struct AttentionShared {
    Shared<float> maxima, totals;  // [warps, ATTENTION_ROWS]
    Shared<uint4> weights;         // [warps, lanes]: what the tensor cores take
};

// One step: KEYS keys from `key`, of which those before `end` exist.
template <typename T, int CHUNKS>
__device__ inline void attend(Tile<T, CHUNKS, ATTENTION_WARPS> &tile, const uint4 (&query)[CHUNKS][2],
                              const AttentionArgs &args, const AttentionItem &item, const AttentionShared &shared,
                              uint32_t key, uint32_t end) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, warp = threadIdx.x / WARP;
    const uint32_t own = key + warp * KV_PAGE;
    float scores[2][4] = {};
    const auto kept = [&](int chunk, int half) { return query[chunk][half]; };
    if (own < end) score<T, CHUNKS>(scores, kept, page_of<T>(args.keys, args, item, own), args.dim);
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
        fade[half] = weigh(scores, half, tile.softmax[half].maximum, maximum[half]);
    }
    const float2 total = row_sum(scores);
    if (t == 0) {
        shared.totals[warp * ATTENTION_ROWS + g] = total.x;
        shared.totals[warp * ATTENTION_ROWS + g + 8] = total.y;
    }
    shared.weights[threadIdx.x] = pack_weights<T>(scores);
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = 0.0f;
        for (int each = 0; each < ATTENTION_WARPS; each++) sum += shared.totals[each * ATTENTION_ROWS + g + 8 * half];
        tile.softmax[half].weight = fmaf(tile.softmax[half].weight, fade[half], sum);
        tile.softmax[half].maximum = maximum[half];
    }
#pragma unroll
    for (int i = 0; i < 4 * CHUNKS; i++) tile.sums[i / 4][i % 4] *= fade[i % 4 / 2];
    for (int each = 0; each < ATTENTION_WARPS && key + each * KV_PAGE < end; each++) {
        const uint32_t start = key + each * KV_PAGE;
        const uint4 weights = shared.weights[each * WARP + threadIdx.x % WARP];
        add_values(tile, weights, page_of<T>(args.values, args, item, start), args.dim, end - start);
    }
}

// What an item that is not WHOLE leaves.
template <typename T, int CHUNKS>
__device__ inline void store_partial(const Tile<T, CHUNKS, ATTENTION_WARPS> &tile, const AttentionArgs &args,
                                     const AttentionItem &item) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const uint32_t stride = args.dim + 2;
    float *partial = args.partial + (size_t(item.partial) * args.kv_heads + blockIdx.y) * ATTENTION_ROWS * stride;
    for_each_sum(tile, args.dim, [&](int row, int half, uint32_t column, float sum) {
        if (tile.exists[half]) partial[row * stride + column] = sum;
    });
    if (threadIdx.x < WARP && t < 2) {
        const Softmax softmax = t ? tile.softmax[1] : tile.softmax[0];
        float *end = partial + (g + 8 * t) * stride + args.dim;
        end[0] = softmax.maximum;
        end[1] = softmax.weight;
    }
}

template <typename T, int CHUNKS>
__device__ void attention_item(const AttentionArgs &args, const AttentionItem &item, const AttentionShared &shared) {
    Tile<T, CHUNKS, ATTENTION_WARPS> tile = {};
    uint4 query[CHUNKS][2];
    load_queries(tile, args, item, [&](int chunk, int half, const uint4 &numbers) { query[chunk][half] = numbers; });
    const Reach reach = reach_of(args, item);
    Tile<T, CHUNKS, ATTENTION_WARPS> whole = tile;
    whole.clear();
    for (uint32_t split = item.first_split; split <= item.last_split; split++) {
        tile.clear();
        const uint32_t stop = min((split + 1) * SPLIT, reach.end);
        for (uint32_t key = split * SPLIT; key < stop; key += KEYS)
            if (key + KEYS > reach.begin) attend(tile, query, args, item, shared, key, stop);
        whole.merge(tile);
    }
    if (item.partial == WHOLE) store_rows(whole, args, item);
    else store_partial(whole, args, item);
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
