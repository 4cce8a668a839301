// Attention where a block works on one tile: each warp takes a page of keys in turn, and a quarter of the
// columns of the values. For rows that decode; for others while they are few.
#include "attention.cuh"

static_assert(ATTENTION_WARPS == PAGES, "a page of a step for each warp");

struct AttentionShared {
    Shared<float> maxima, totals;  // [warps, ATTENTION_ROWS]
    Shared<uint4> weights;         // [warps, lanes]: what the tensor cores take
};

// Keys are loaded a step before they are scored, values before the scores that weigh them, where registers
// suffice; pages are brought to the second cache this many steps before.
constexpr int MOST_CHUNKS_AHEAD = 4;
constexpr int PREFETCH_STEPS = 2;

// The keys that a block goes over, and where they lie. Each lane knows one page of a split and the next.
struct Walk {
    uint32_t key, limit;   // where the step begins, and where all end
    uint32_t table;        // the sequence's block table
    uint32_t page, ahead;  // of the split and the next; of the split after and its next, on their way

    __device__ uint32_t load_page(const AttentionArgs &args, uint32_t split) const {
        const uint32_t page = split * (SPLIT / KV_PAGE) + threadIdx.x % WARP;
        return args.blocks[table + min(page, (limit - 1) / KV_PAGE)];
    }
    __device__ void begin_split(const AttentionArgs &args, uint32_t split) {
        page = ahead;
        ahead = load_page(args, split + 1);
    }
    // The page of a key of this split or the next; all lanes ask for the same.
    __device__ uint32_t page_of(uint32_t at) const {
        return __shfl_sync(ALL_LANES, page, at / KV_PAGE - key / SPLIT * (SPLIT / KV_PAGE));
    }
    // The warp's own page of a step to come.
    template <typename T>
    __device__ void prefetch(const AttentionArgs &args, uint32_t steps) const {
        const uint32_t at = key + steps * STEP_KEYS + threadIdx.x / WARP * KV_PAGE;
        if (at >= limit) return;
        const uint32_t page = page_of(at), lines = args.page_dim * KV_PAGE * sizeof(T) / LINE;
        for (uint32_t line = threadIdx.x % WARP; line < 2 * lines; line += WARP) {
            const T *start = page_at<T>(line < lines ? args.keys : args.values, args, page);
            prefetch_line(start + line % lines * (LINE / sizeof(T)));
        }
    }
};

// What a warp has of a step: its page's keys, and its columns of all pages' values.
template <typename T, int CHUNKS>
struct Loaded {
    static constexpr bool AHEAD = CHUNKS <= MOST_CHUNKS_AHEAD;
    static constexpr int PARTS = Tile<T, CHUNKS, ATTENTION_WARPS>::PARTS;
    uint4 keys[CHUNKS][2];
    uint2 values[PAGES][PARTS];

    // Those of the warp's page from key `own` on.
    __device__ void load_keys(const AttentionArgs &args, const Walk &walk, uint32_t own) {
        if (own >= walk.limit) return;
        const T *page = page_at<T>(args.keys, args, walk.page_of(own));
#pragma unroll
        for (int i = 0; i < 2 * CHUNKS; i++) keys[i / 2][i % 2] = load_key(page, args.page_dim, i / 2, i % 2);
    }
    __device__ void load_page_values(const AttentionArgs &args, const Walk &walk, int page) {
        const uint32_t start = walk.key + page * KV_PAGE;
        if (start >= walk.limit) return;
        const T *from = page_at<T>(args.values, args, walk.page_of(start));
        const int first = Tile<T, CHUNKS, ATTENTION_WARPS>::first_part();
#pragma unroll
        for (int part = 0; part < PARTS; part++) values[page][part] = load_values(from, args.page_dim, first + part);
    }
};

// Scores of the warp's own page in a step; loads the keys of that in the next.
template <typename T, int CHUNKS>
__device__ inline void score_page(float (&scores)[2][4], const uint4 (&query)[CHUNKS][2], Loaded<T, CHUNKS> &loaded,
                                  const AttentionArgs &args, const Walk &walk, uint32_t own) {
    if (own < walk.limit) {
        const T *page = page_at<T>(args.keys, args, walk.page_of(own));
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
            score<T>(scores, query[chunk][0], query[chunk][1], [&](int j) {
                return loaded.AHEAD ? loaded.keys[chunk][j] : load_key(page, args.page_dim, chunk, j);
            });
    }
    if (loaded.AHEAD) loaded.load_keys(args, walk, own + STEP_KEYS);
}

// Scores → weights of a step in shared memory, and the softmax of the tile: with those of the other warps. How
// what was summed before fades, for rows g and g + 8.
template <typename T, int CHUNKS>
__device__ inline float2 weigh_together(float (&scores)[2][4], Tile<T, CHUNKS, ATTENTION_WARPS> &tile,
                                        const AttentionShared &shared) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, own = threadIdx.x / WARP * ATTENTION_ROWS + g;
    const float2 greatest = row_max(scores);
    if (t == 0) {
        shared.maxima[own] = greatest.x;
        shared.maxima[own + 8] = greatest.y;
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
        shared.totals[own] = total.x;
        shared.totals[own + 8] = total.y;
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
    return make_float2(fade[0], fade[1]);
}

// One step: STEP_KEYS keys, of which those before the end exist.
template <typename T, int CHUNKS>
__device__ inline void attend(Tile<T, CHUNKS, ATTENTION_WARPS> &tile, const uint4 (&query)[CHUNKS][2],
                              Loaded<T, CHUNKS> &loaded, const AttentionArgs &args, const AttentionShared &shared,
                              const Walk &walk) {
    const uint32_t own = walk.key + threadIdx.x / WARP * KV_PAGE;
    walk.prefetch<T>(args, PREFETCH_STEPS);
    if (loaded.AHEAD) {
#pragma unroll
        for (int page = 0; page < PAGES; page++) loaded.load_page_values(args, walk, page);
    }
    float scores[2][4] = {};
    score_page(scores, query, loaded, args, walk, own);
    mask(scores, tile, args, own);
    const float2 fade = weigh_together(scores, tile, shared);
#pragma unroll
    for (int i = 0; i < 4 * CHUNKS; i++) tile.sums[i / 4][i % 4] *= i % 4 < 2 ? fade.x : fade.y;
#pragma unroll
    for (int page = 0; page < PAGES; page++) {
        const uint32_t start = walk.key + page * KV_PAGE;
        if (start >= walk.limit) break;
        if (!loaded.AHEAD) loaded.load_page_values(args, walk, page);
        const uint4 weights = shared.weights[page * WARP + threadIdx.x % WARP];
        add_values(tile, weights, walk.limit - start, [&](int part) { return loaded.values[page][part]; });
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
    Walk walk;
    walk.key = max(item.first_split * SPLIT, reach.begin / STEP_KEYS * STEP_KEYS);
    walk.limit = min((item.last_split + 1) * SPLIT, reach.end);
    walk.table = item.blocks;
    walk.page = walk.ahead = walk.load_page(args, walk.key / SPLIT);
    for (int steps = 0; steps < PREFETCH_STEPS; steps++) walk.prefetch<T>(args, steps);
    Loaded<T, CHUNKS> loaded = {};
    if (loaded.AHEAD) loaded.load_keys(args, walk, walk.key + threadIdx.x / WARP * KV_PAGE);
    Tile<T, CHUNKS, ATTENTION_WARPS> whole = tile;
    whole.clear();
    for (uint32_t split = walk.key / SPLIT; split <= item.last_split; split++) {
        walk.begin_split(args, split);
        tile.clear();
        const uint32_t stop = min((split + 1) * SPLIT, walk.limit);
        for (; walk.key < stop; walk.key += STEP_KEYS) attend(tile, query, loaded, args, shared, walk);
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

#define ATTENTION(T, chunks, blocks)                                                             \
    EAGER_KERNEL(attention_##T##_##chunks, AttentionArgs, ATTENTION_THREADS, blocks) {           \
        await_previous();                                                                        \
        attention<T, chunks>(args);                                                              \
    }
#define ATTENTIONS(T)                                                \
    ATTENTION(T, 1, 4) ATTENTION(T, 2, 4) ATTENTION(T, 3, 3)         \
    ATTENTION(T, 4, 2) ATTENTION(T, 6, 2) ATTENTION(T, 8, 1)

ATTENTIONS(f16)
ATTENTIONS(bf16)

constexpr int MERGE_THREADS = 512;

// Puts the partial results of a tile's splits together, in ascending order.
template <typename T>
__device__ void merge(const AttentionArgs &args) {
    const MergeItem *items = reinterpret_cast<const MergeItem *>(args.items);
    const uint32_t stride = args.dim + 2;
    const size_t size = size_t(args.kv_heads) * ATTENTION_ROWS * stride;
    for (uint32_t at = blockIdx.x; at < *args.num_items; at += gridDim.x) {
        const MergeItem item = items[at];
        const float *first = args.partial + item.partial * size + size_t(blockIdx.y) * ATTENTION_ROWS * stride;
        for (uint32_t i = threadIdx.x; i < ATTENTION_ROWS * args.dim; i += MERGE_THREADS) {
            const uint32_t row = i / args.dim, column = i % args.dim;
            const uint32_t index = item.tile * ATTENTION_ROWS + row;
            const Query query = query_of(args, item.first_row, item.rows, index, blockIdx.y);
            if (!query.exists) continue;
            Softmax whole = {-INFINITY, 0.0f};
            float sum = 0.0f;
#pragma unroll 4
            for (uint32_t split = 0; split < item.count; split++) {
                const float *partial = first + split * size + row * stride;
                const float2 factors = merge_softmax(whole, {partial[args.dim], partial[args.dim + 1]});
                sum = merge_sums(sum, partial[column], factors);
            }
            out_of<T>(args, query)[column] = from_float<T>(sum / whole.weight);
        }
    }
}

KERNEL(merge_f16, AttentionArgs, MERGE_THREADS) { merge<f16>(args); }
KERNEL(merge_bf16, AttentionArgs, MERGE_THREADS) { merge<bf16>(args); }

constexpr int MAX_COLUMNS = 256 / WARP;

// Of one head's query q with a key of the sequence.
__device__ inline float exact_product(const AttentionArgs &args, const AttentionItem &item, const Shared<float> &q,
                                      uint32_t key) {
    const float *k = page_at<float>(args.keys, args, args.blocks[item.blocks + key / KV_PAGE]);
    k += key % KV_PAGE * args.page_dim;
    float product = 0.0f;
    for (uint32_t i = 0; i < args.dim; i++) product = fmaf(q[i], k[i], product);
    return product;
}

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
        const bool seen = own >= begin && own <= position;
        const float score = seen ? exact_product(args, item, q, own) * args.scale : -INFINITY;
        const float maximum = fmaxf(softmax.maximum, warp_max(score));
        const float fade = power_of_two(softmax.maximum - maximum), weight = power_of_two(score - maximum);
        softmax = {maximum, fmaf(softmax.weight, fade, warp_sum(weight))};
        for (int each = 0; each < MAX_COLUMNS; each++) sums[each] *= fade;
        for (int other = 0; other < WARP && key + other <= position; other++) {
            const uint32_t at = key + other;
            const float its = __shfl_sync(ALL_LANES, weight, other);
            if (at < begin) continue;
            const float *v = page_at<float>(args.values, args, args.blocks[item.blocks + at / KV_PAGE]) + at % KV_PAGE;
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
