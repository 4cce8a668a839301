// Attention for prompts: a warp has a tile of its own, and the four of a block read a sequence's keys and values
// together, from shared memory, where those of the next step arrive meanwhile. Scores are weighed in the same
// steps, and summed in the same order, as in attention.cu.
#include "attention.cuh"

static_assert(ATTENTION_WARPS == PAGES, "a page of a step for each warp to copy");

// Of a block, for heads of up to 32 · CHUNKS columns: two steps of keys and values as the lanes take them, and each
// thread's own queries.
template <int CHUNKS>
struct PrefillShared {
    static constexpr int PAGE = 4 * CHUNKS * WARP;  // units of 16 bytes of a page: keys, then values
    static constexpr int STEPS = 2 * PAGES * PAGE;
    Shared<uint4> units, queries;
    Shared<uint2> pairs;

    __device__ static PrefillShared take() {
        SharedBytes all, pairs;
        const Shared<uint4> units = all.take<uint4>(STEPS);
        return {units, all.take<uint4>(2 * CHUNKS * ATTENTION_THREADS), pairs.take<uint2>(2 * STEPS)};
    }
    // Where a page of the step from `key` starts.
    __device__ static int start(uint32_t key, int page) { return (key / STEP_KEYS % 2 * PAGES + page) * PAGE; }
};

// Begins to copy the warp's page of the step from `key` on.
template <typename T, int CHUNKS>
__device__ inline void begin_step(const PrefillShared<CHUNKS> &shared, const AttentionArgs &args, uint32_t key,
                                  uint32_t page) {
    const T *keys = page_at<T>(args.keys, args, page), *values = page_at<T>(args.values, args, page);
    const int start = shared.start(key, threadIdx.x / WARP) + threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 2 * CHUNKS; i++)
        copy16_async(shared.units, start + i * WARP, key_at(keys, args.page_dim, i / 2, i % 2),
                     has_key(args.page_dim, i / 2));
#pragma unroll
    for (int i = 0; i < 2 * CHUNKS; i++) {
        const uint32_t unit = i * WARP + threadIdx.x % WARP;
        copy16_async(shared.units, start + (2 * CHUNKS + i) * WARP, values + 8 * unit,
                     8 * unit < KV_PAGE * args.page_dim);
    }
}

// Scores → weights of STEP_KEYS keys from `key`, the softmax of the tile with them, and how what was summed
// before fades.
template <typename T, int CHUNKS>
__device__ inline void weigh_step(float (&scores)[PAGES][2][4], float (&fade)[2], Tile<T, CHUNKS, 1> &tile,
                                  const AttentionArgs &args, uint32_t key) {
    float maximum[2] = {tile.softmax[0].maximum, tile.softmax[1].maximum}, sum[2] = {};
#pragma unroll
    for (int page = 0; page < PAGES; page++) {
        mask(scores[page], tile, args, key + page * KV_PAGE);
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
}

// One step of a warp: STEP_KEYS keys from `key`, of which those before `end` exist.
template <typename T, int CHUNKS>
__device__ inline void attend_step(Tile<T, CHUNKS, 1> &tile, const PrefillShared<CHUNKS> &shared,
                                   const AttentionArgs &args, uint32_t key, uint32_t end) {
    const int lane = threadIdx.x % WARP;
    float scores[PAGES][2][4] = {}, fade[2];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const uint4 q0 = shared.queries[2 * chunk * ATTENTION_THREADS + threadIdx.x];
        const uint4 q1 = shared.queries[(2 * chunk + 1) * ATTENTION_THREADS + threadIdx.x];
#pragma unroll
        for (int page = 0; page < PAGES; page++) {
            if (key + page * KV_PAGE >= end) break;
            const int start = shared.start(key, page) + 2 * chunk * WARP + lane;
            score<T>(scores[page], q0, q1, [&](int j) { return uint4(shared.units[start + j * WARP]); });
        }
    }
    weigh_step(scores, fade, tile, args, key);
#pragma unroll
    for (int i = 0; i < 4 * tile.PARTS; i++) tile.sums[i / 4][i % 4] *= fade[i % 4 / 2];
#pragma unroll
    for (int page = 0; page < PAGES; page++) {
        const uint32_t first = key + page * KV_PAGE;
        if (first >= end) break;
        const int start = 2 * (shared.start(key, page) + 2 * CHUNKS * WARP) + lane;
        add_values(tile, pack_weights<T>(scores[page]), end - first,
                   [&](int part) { return uint2(shared.pairs[start + part * WARP]); });
    }
}

// The warp's tile is `own`; `reach`: of all tiles of the block.
template <typename T, int CHUNKS>
__device__ void prefill_item(const AttentionArgs &args, const AttentionItem &own, const Reach &reach,
                             const PrefillShared<CHUNKS> &shared) {
    Tile<T, CHUNKS, 1> tile = {};
    load_queries(tile, args, own, [&](int chunk, int half, const uint4 &numbers) {
        shared.queries[(2 * chunk + half) * ATTENTION_THREADS + threadIdx.x] = numbers;
    });
    const bool exists = own.tile * ATTENTION_ROWS < own.rows * (args.heads / args.kv_heads);
    const Reach seen = exists ? reach_of(args, own) : Reach{0, 0};
    const auto page_of = [&](uint32_t key) {
        return args.blocks[own.blocks + min(key / KV_PAGE + threadIdx.x / WARP, (reach.end - 1) / KV_PAGE)];
    };
    uint32_t key = reach.begin / STEP_KEYS * STEP_KEYS, page = page_of(key);
    begin_step<T, CHUNKS>(shared, args, key, page);
    copy_commit();
    page = page_of(key + STEP_KEYS);
    tile.clear();
    Tile<T, CHUNKS, 1> whole = tile;
    for (; key < reach.end; key += STEP_KEYS) {
        copy_wait<0>();
        __syncthreads();  // the step is there for all, and all have left the one before
        if (key + STEP_KEYS < reach.end) begin_step<T, CHUNKS>(shared, args, key + STEP_KEYS, page);
        copy_commit();
        page = page_of(key + 2 * STEP_KEYS);
        if (key + STEP_KEYS > seen.begin && key < seen.end) attend_step(tile, shared, args, key, seen.end);
        if ((key + STEP_KEYS) % SPLIT == 0) {
            whole.merge(tile);
            tile.clear();
        }
    }
    whole.merge(tile);
    if (exists) store_rows(whole, args, own);
    __syncthreads();  // the next item's first step may take the place of this one's last
}

// Grid: any number of blocks, which share the items, × key/value heads. An item has four tiles from its own.
template <typename T, int CHUNKS>
__device__ void prefill(const AttentionArgs &args) {
    const PrefillShared<CHUNKS> shared = PrefillShared<CHUNKS>::take();
    const AttentionItem *items = reinterpret_cast<const AttentionItem *>(args.items);
    const uint32_t group = args.heads / args.kv_heads;
    for (uint32_t at = blockIdx.x; at < *args.num_items; at += gridDim.x) {
        // Backwards: the last tiles of a sequence see the most keys.
        AttentionItem item = items[*args.num_items - 1 - at];
        const uint32_t tiles = (item.rows * group + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
        AttentionItem last = item;
        last.tile = min(item.tile + ATTENTION_WARPS, tiles) - 1;
        const Reach reach = {reach_of(args, item).begin, reach_of(args, last).end};
        item.tile += threadIdx.x / WARP;
        prefill_item<T, CHUNKS>(args, item, reach, shared);
    }
}

#define PREFILL(T, chunks) \
    KERNEL(prefill_##T##_##chunks, AttentionArgs, ATTENTION_THREADS) { prefill<T, chunks>(args); }

PREFILL(f16, 1)
PREFILL(f16, 2)
PREFILL(f16, 3)
PREFILL(f16, 4)
PREFILL(bf16, 1)
PREFILL(bf16, 2)
PREFILL(bf16, 3)
PREFILL(bf16, 4)
