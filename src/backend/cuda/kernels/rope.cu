// Norm and rotation of queries and keys, and the write of keys and values to their pages, in one pass.
#include "common.cuh"

constexpr int ROPE_WARPS = 8;
constexpr int PAGE = 16;               // tokens in a page
constexpr int MAX_PAIRS = 256 / 2 / WARP;  // of a head, for each lane
constexpr uint32_t NO_SLOT = 0xffffffffu;

enum QkNorm : uint32_t { NO_NORM, NORM_BEFORE_ROPE, NORM_AFTER_ROPE };

struct RopeArgs {
    void *qkv;                  // [rows, width]: queries, keys, values of all heads, then what else there is
    const float *cos, *sin;     // [positions, dim / 2]
    const float *q_norm, *k_norm;  // [dim]; null without norm
    const uint32_t *positions;  // [rows]
    const uint32_t *slots;      // [rows]: page · PAGE + token in page, or NO_SLOT
    void *keys;                 // [pages, kv_heads, PAGE, page_dim]
    void *values;               // [pages, kv_heads, page_dim, PAGE]
    uint32_t heads, kv_heads, dim, width, page_dim, adjacent, qk_norm;
    float eps;
};

// The numbers of a head that a lane rotates together: pair j is lane + WARP · j.
struct Pairs {
    float a[MAX_PAIRS], b[MAX_PAIRS];
};

__device__ inline int pair_of(int j) { return threadIdx.x % WARP + WARP * j; }
__device__ inline int first_of(const RopeArgs &args, int pair) { return args.adjacent ? 2 * pair : pair; }
__device__ inline int second_of(const RopeArgs &args, int pair) {
    return args.adjacent ? 2 * pair + 1 : pair + args.dim / 2;
}

__device__ inline void norm(Pairs &x, const RopeArgs &args, const float *weight) {
    float squares = 0.0f;
    for (int j = 0; j < MAX_PAIRS; j++) squares += x.a[j] * x.a[j] + x.b[j] * x.b[j];
    const float scale = 1.0f / sqrtf(warp_sum(squares) / float(args.dim) + args.eps);
    for (int j = 0; j < MAX_PAIRS; j++) {
        const int pair = pair_of(j);
        if (pair >= int(args.dim / 2)) continue;
        x.a[j] *= scale * weight[first_of(args, pair)];
        x.b[j] *= scale * weight[second_of(args, pair)];
    }
}

__device__ inline void rotate(Pairs &x, const RopeArgs &args, uint32_t position) {
    for (int j = 0; j < MAX_PAIRS; j++) {
        const int pair = pair_of(j), half = args.dim / 2;
        if (pair >= half) continue;
        const float cos = args.cos[size_t(position) * half + pair], sin = args.sin[size_t(position) * half + pair];
        const float a = x.a[j], b = x.b[j];
        x.a[j] = a * cos - b * sin;
        x.b[j] = a * sin + b * cos;
    }
}

// Norms and rotates a head from `from` to `to`.
template <typename T>
__device__ inline void rope_head(const RopeArgs &args, const T *from, T *to, const float *weight, uint32_t position) {
    Pairs x = {};
    for (int j = 0; j < MAX_PAIRS; j++) {
        const int pair = pair_of(j);
        if (pair >= int(args.dim / 2)) continue;
        x.a[j] = to_float(from[first_of(args, pair)]);
        x.b[j] = to_float(from[second_of(args, pair)]);
    }
    if (args.qk_norm == NORM_BEFORE_ROPE) norm(x, args, weight);
    rotate(x, args, position);
    if (args.qk_norm == NORM_AFTER_ROPE) norm(x, args, weight);
    for (int j = 0; j < MAX_PAIRS; j++) {
        const int pair = pair_of(j);
        if (pair >= int(args.dim / 2)) continue;
        to[first_of(args, pair)] = from_float<T>(x.a[j]);
        to[second_of(args, pair)] = from_float<T>(x.b[j]);
    }
}

// Grid: rows × heads by ROPE_WARPS. A warp for each head.
template <typename T>
__device__ void rope_and_cache(const RopeArgs &args) {
    const uint32_t position = args.positions[blockIdx.x], slot = args.slots[blockIdx.x];
    const uint32_t dim = args.dim, kv_heads = args.kv_heads;
    T *row = static_cast<T *>(args.qkv) + size_t(blockIdx.x) * args.width;
    const uint32_t head = blockIdx.y * ROPE_WARPS + threadIdx.x / WARP;
    T *from = row + head * dim;
    if (head < args.heads) {
        rope_head(args, from, from, args.q_norm, position);
        return;
    }
    if (head >= args.heads + 2 * kv_heads || slot == NO_SLOT) return;
    const uint32_t kv_head = (head - args.heads) % kv_heads;
    const size_t page = size_t(slot / PAGE) * kv_heads + kv_head, token = slot % PAGE;
    if (head < args.heads + kv_heads) {
        T *key = static_cast<T *>(args.keys) + (page * PAGE + token) * args.page_dim;
        rope_head(args, from, key, args.k_norm, position);
    } else {
        T *values = static_cast<T *>(args.values) + page * args.page_dim * PAGE + token;
        for (uint32_t i = threadIdx.x % WARP; i < dim; i += WARP) values[size_t(i) * PAGE] = from[i];
    }
}

KERNEL(rope_and_cache_f32, RopeArgs, ROPE_WARPS *WARP) { rope_and_cache<float>(args); }
KERNEL(rope_and_cache_f16, RopeArgs, ROPE_WARPS *WARP) { rope_and_cache<f16>(args); }
KERNEL(rope_and_cache_bf16, RopeArgs, ROPE_WARPS *WARP) { rope_and_cache<bf16>(args); }
