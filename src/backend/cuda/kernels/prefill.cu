// Attention for prompts: a warp has a tile of its own, or two have one where heads are large, so four or
// two tiles read a sequence's keys and values together. Scores are weighed in the same steps, and summed
// in the same order, as in attention.cu.
#include "attention.cuh"

constexpr int STEP_KEYS = PAGES * KV_PAGE;

// One step: STEP_KEYS keys from `key`, of which those before `end` exist.
template <typename T, int CHUNKS, int SHARES>
__device__ inline void attend_alone(Tile<T, CHUNKS, SHARES> &tile, const Shared<uint4> &queries,
                                    const AttentionArgs &args, const AttentionItem &item, uint32_t key,
                                    uint32_t end) {
    float scores[PAGES][2][4] = {};
    float maximum[2] = {tile.softmax[0].maximum, tile.softmax[1].maximum}, fade[2], sum[2] = {};
#pragma unroll
    for (int page = 0; page < PAGES; page++) {
        const uint32_t start = key + page * KV_PAGE;
        const auto kept = [&](int chunk, int half) {
            return uint4(queries[(2 * chunk + half) * ATTENTION_THREADS + threadIdx.x]);
        };
        if (start < end) {
            const T *keys = page_at<T>(args.keys, args, args.blocks[item.blocks + start / KV_PAGE]);
            const auto loaded = [&](int chunk, int j) { return load_key(keys, args.dim, chunk, j); };
            score<T, CHUNKS>(scores[page], kept, loaded);
        }
        mask(scores[page], tile, args, start);
        const float2 greatest = row_max(scores[page]);
        maximum[0] = fmaxf(maximum[0], greatest.x);
        maximum[1] = fmaxf(maximum[1], greatest.y);
    }
#pragma unroll
    for (int page = 0; page < PAGES; page++) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            fade[half] = weigh(scores[page], half, tile.softmax[half].maximum, maximum[half]);
        const float2 total = row_sum(scores[page]);
        sum[0] += total.x;
        sum[1] += total.y;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        tile.softmax[half].weight = fmaf(tile.softmax[half].weight, fade[half], sum[half]);
        tile.softmax[half].maximum = maximum[half];
    }
#pragma unroll
    for (int i = 0; i < 4 * tile.PARTS; i++) tile.sums[i / 4][i % 4] *= fade[i % 4 / 2];
#pragma unroll
    for (int page = 0; page < PAGES; page++) {
        const uint32_t start = key + page * KV_PAGE;
        if (start >= end) break;
        const uint4 weights = pack_weights<T>(scores[page]);
        const T *values = page_at<T>(args.values, args, args.blocks[item.blocks + start / KV_PAGE]);
        add_values(tile, weights, end - start,
                   [&](int part) { return load_values(values, args.dim, tile.first_part() + part); });
    }
}

template <typename T, int CHUNKS, int SHARES>
__device__ void prefill_tile(const AttentionArgs &args, const AttentionItem &item, const Shared<uint4> &queries) {
    Tile<T, CHUNKS, SHARES> tile = {};
    load_queries(tile, args, item, [&](int chunk, int half, const uint4 &numbers) {
        queries[(2 * chunk + half) * ATTENTION_THREADS + threadIdx.x] = numbers;
    });
    const Reach reach = reach_of(args, item);
    Tile<T, CHUNKS, SHARES> whole = tile;
    whole.clear();
    for (uint32_t split = reach.begin / SPLIT; split * SPLIT < reach.end; split++) {
        tile.clear();
        const uint32_t stop = min((split + 1) * SPLIT, reach.end);
        for (uint32_t key = split * SPLIT; key < stop; key += STEP_KEYS)
            if (key + STEP_KEYS > reach.begin) attend_alone(tile, queries, args, item, key, stop);
        whole.merge(tile);
    }
    store_rows(whole, args, item);
}

// Grid: any number of blocks, which share the items, × key/value heads. An item has
// 4 / SHARES tiles from its own.
template <typename T, int CHUNKS, int SHARES>
__device__ void prefill(const AttentionArgs &args) {
    SHARED(uint4, queries, 2 * CHUNKS * ATTENTION_THREADS);  // each thread its own
    const AttentionItem *items = reinterpret_cast<const AttentionItem *>(args.items);
    const uint32_t group = args.heads / args.kv_heads;
    for (uint32_t at = blockIdx.x; at < *args.num_items; at += gridDim.x) {
        AttentionItem item = items[at];
        item.tile += threadIdx.x / WARP / SHARES;
        if (item.tile * ATTENTION_ROWS < item.rows * group) prefill_tile<T, CHUNKS, SHARES>(args, item, queries);
    }
}

#define PREFILL(T, chunks, shares) \
    KERNEL(prefill_##T##_##chunks, AttentionArgs, ATTENTION_THREADS) { prefill<T, chunks, shares>(args); }

PREFILL(f16, 1, 1)
PREFILL(f16, 2, 1)
PREFILL(f16, 3, 2)
PREFILL(f16, 4, 2)
PREFILL(bf16, 1, 1)
PREFILL(bf16, 2, 1)
PREFILL(bf16, 3, 2)
PREFILL(bf16, 4, 2)
