// Logits → tokens, as `sampler` does it on the CPU: temperature, min-p, top-k, top-p, and the draw by a
// uniform number that the host has made. A block for each row.
//
// Weights are exp((logit - max) · scale) in units of 2⁻⁴⁰. Sums of integers have no order, so a token
// depends on its row alone. Nothing is sorted: thresholds are found digit by digit of the logits' bits.
#include "common.cuh"

typedef unsigned long long Mass;

struct Draw {
    uint32_t row;    // of the logits
    uint32_t top_k;  // 0: all
    float scale;     // 1 / temperature; 0: the likeliest token
    float min_p;
    double top_p, uniform;
};

// What `score` finds: `top` ids and logits of the likeliest come after it, in any order.
struct Score {
    Mass sum;  // of the weights at temperature 1
    float max, logit;
    uint32_t above, token;  // logits that are larger than the token's
};

struct ScoreArgs {
    const float *logits;     // [rows, vocab]
    const uint32_t *asks;    // of the blocks: the row, the place of its token, how many of the likeliest
    const uint32_t *tokens;
    uint32_t *scores;        // of the blocks: `stride` words, a Score first
    uint32_t vocab, stride;
};

struct SampleArgs {
    const float *logits;  // [rows, vocab]
    const Draw *draws;    // of the blocks
    uint32_t *tokens;     // of the blocks; NO_TOKEN where a logit is NaN, or the largest is infinite
    uint32_t vocab;
};

constexpr int SAMPLE_WARPS = 32, SAMPLE_THREADS = SAMPLE_WARPS * WARP;
constexpr uint32_t NO_TOKEN = 0xffffffffu;
constexpr int DIGITS = 1 << 11, GROUPS = 64;  // of a digit's values, and sums over as many of them

// Larger for larger logits, the same for both zeros.
__device__ inline uint32_t key_of(float logit) {
    const uint32_t bits = __float_as_uint(logit + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

__device__ inline float logit_of(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffff : ~key);
}

struct Weights {
    float max, scale;
    __device__ float operator()(float logit) const { return expf((logit - max) * scale); }
    __device__ Mass mass(float logit) const { return Mass((*this)(logit) * 1099511627776.0f); }
};

template <typename V>
__device__ inline V warp_total(V x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// The largest over the block; every thread gets it.
__device__ inline Mass block_max(Mass x, const Shared<Mass> &room) {
    for (int step = WARP / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, step));
    __syncthreads();
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
    __syncthreads();
    for (int warp = 0; warp < SAMPLE_WARPS; warp++) x = max(x, Mass(room[warp]));
    return x;
}

// Calls visit(id, logit) for the thread's logits of a row: by fours where they are aligned, several on their way.
template <typename Visit>
__device__ inline void for_each_logit(const float *logits, uint32_t vocab, const Visit &visit) {
    constexpr uint32_t LOADS = 4, STRIDE = 4 * SAMPLE_THREADS;
    const uint32_t aligned = reinterpret_cast<uintptr_t>(logits) % 16 ? 0 : vocab / 4 * 4;
    for (uint32_t first = 4 * threadIdx.x; first < aligned; first += LOADS * STRIDE) {
        uint4 four[LOADS];
#pragma unroll
        for (uint32_t i = 0; i < LOADS; i++)
            if (first + i * STRIDE < aligned) four[i] = load16(logits + first + i * STRIDE);
#pragma unroll
        for (uint32_t i = 0; i < LOADS; i++) {
            const uint32_t id = first + i * STRIDE;
            if (id >= aligned) break;
            visit(id, __uint_as_float(four[i].x));
            visit(id + 1, __uint_as_float(four[i].y));
            visit(id + 2, __uint_as_float(four[i].z));
            visit(id + 3, __uint_as_float(four[i].w));
        }
    }
    for (uint32_t id = aligned + threadIdx.x; id < vocab; id += SAMPLE_THREADS) visit(id, logits[id]);
}

// Sums of masses in two words each, the lower first: to words GPUs add at once, to more they do not.
struct Histogram {
    Shared<uint32_t> words;
    __device__ void add(int i, Mass x) const {
        const uint32_t low = uint32_t(x), before = atomic_add(words, 2 * i, low);
        const uint32_t high = uint32_t(x >> 32) + (before + low < low);
        if (high) atomic_add(words, 2 * i + 1, high);
    }
    __device__ Mass operator[](int i) const { return Mass(words[2 * i + 1]) << 32 | Mass(words[2 * i]); }
};

struct Threshold {
    uint32_t key;  // the largest at which what lies at or above it measures enough
    Mass above;    // what lies above it
};

// Goes down the digits of the keys, 11 bits, 11 and 10; `measure` gives what a logit counts.
template <typename Measure>
__device__ Threshold threshold(const float *logits, uint32_t vocab, Mass goal, const Measure &measure) {
    SHARED(uint32_t, words, 2 * DIGITS);
    SHARED(Mass, sums, GROUPS);
    const Histogram histogram{words};
    SHARED(Mass, found, 2);
    Threshold result = {0, 0};
    for (int shift = 21; shift >= 0; shift = shift > 10 ? 10 : shift - 10) {
        const int above_digit = shift == 0 ? 10 : shift + 11;  // bits that are settled start here
        const int digits = 1 << (above_digit - shift);
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * digits; i += SAMPLE_THREADS) words[i] = 0;
        __syncthreads();
        for_each_logit(logits, vocab, [&](uint32_t, float logit) {
            const uint32_t key = key_of(logit);
            if (above_digit < 32 && key >> above_digit != result.key >> above_digit) return;
            const Mass counted = measure(logit);
            if (counted) histogram.add(key >> shift & (digits - 1), counted);
        });
        __syncthreads();
        const int width = digits / GROUPS;
        if (threadIdx.x < GROUPS) {
            Mass sum = 0;
            for (int i = 0; i < width; i++) sum += histogram[threadIdx.x * width + i];
            sums[threadIdx.x] = sum;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            Mass above = result.above;
            int group = GROUPS - 1;
            while (group > 0 && above + sums[group] < goal) above += sums[group--];
            int digit = group * width + width - 1;
            while (digit > group * width && above + histogram[digit] < goal) above += histogram[digit--];
            found[0] = digit;
            found[1] = above;
        }
        __syncthreads();
        result.key |= uint32_t(found[0]) << shift;
        result.above = found[1];
    }
    return result;
}

// What may be drawn: logits of at least `key`; of those that equal it, the first `ties` by id.
struct Kept {
    uint32_t key, ties;
    Weights weights;
    float min_weight;

    __device__ Mass mass(float logit) const {
        return key_of(logit) >= key && weights(logit) >= min_weight ? weights.mass(logit) : 0;
    }
};

__device__ Kept kept_of(const float *logits, uint32_t vocab, const Draw &draw, const Weights &weights) {
    Kept kept = {0, NO_TOKEN, weights, draw.min_p};
    if (draw.top_k && draw.top_k < vocab)
        kept.key = threshold(logits, vocab, draw.top_k, [](float) { return Mass(1); }).key;
    if (draw.top_p < 1.0) {
        SHARED(Mass, total, 1);
        __syncthreads();
        if (threadIdx.x == 0) total[0] = 0;
        __syncthreads();
        Mass own = 0;
        for_each_logit(logits, vocab, [&](uint32_t, float logit) { own += kept.mass(logit); });
        own = warp_total(own);
        if (threadIdx.x % WARP == 0) atomic_add(total, 0, own);
        __syncthreads();
        const Mass whole = total[0];
        const Mass goal = max(Mass(1), min(whole, Mass(ceil(draw.top_p * double(whole)))));
        const Threshold nucleus = threshold(logits, vocab, goal, [&](float logit) { return kept.mass(logit); });
        const Mass each = max(Mass(1), kept.mass(logit_of(nucleus.key)));
        kept.ties = uint32_t(min((goal - nucleus.above + each - 1) / each, Mass(vocab)));
        kept.key = nucleus.key;
    }
    return kept;
}

// Inclusive sum over the lanes up to this one.
template <typename V>
__device__ inline V running_sum(V x) {
    const int lane = threadIdx.x % WARP;
    for (int step = 1; step < WARP; step *= 2) {
        const V left = __shfl_sync(ALL_LANES, x, max(lane - step, 0));
        if (lane >= step) x += left;
    }
    return x;
}

// A part of a row, and what is kept before it: mass, and logits that equal the least.
struct Part {
    uint32_t start, end;
    Mass before;
    uint32_t ties_before;
};

// The id of the part at which the sum of what is kept passes `target`. For a warp.
__device__ void find(const float *logits, const Kept &kept, Part part, Mass target, uint32_t *token) {
    const Mass each = kept.mass(logit_of(kept.key));
    for (uint32_t first = part.start; first < part.end; first += WARP) {
        const uint32_t id = first + threadIdx.x % WARP;
        const bool tied = id < part.end && key_of(logits[id]) == kept.key;
        const uint32_t tie = running_sum(uint32_t(tied));
        Mass weight = 0;
        if (tied) weight = part.ties_before + tie <= kept.ties ? each : 0;
        else if (id < part.end) weight = kept.mass(logits[id]);
        const Mass running = part.before + running_sum(weight);
        if (weight && target < running && target >= running - weight) *token = id;
        part.before = __shfl_sync(ALL_LANES, running, WARP - 1);
        part.ties_before += __shfl_sync(ALL_LANES, tie, WARP - 1);
    }
}

// The first id at which the sum of what is kept passes `uniform` times the whole. Each warp sums a part
// of the row; one of them looks on in the part where it happens.
__device__ void pick(const float *logits, uint32_t vocab, const Kept &kept, double uniform, uint32_t *token) {
    SHARED(Mass, masses, SAMPLE_WARPS);
    SHARED(uint32_t, ties, SAMPLE_WARPS);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const uint32_t width = (vocab + SAMPLE_THREADS - 1) / SAMPLE_THREADS * WARP;
    Part part = {min(warp * width, vocab), min((warp + 1) * width, vocab), 0, 0};
    Mass own = 0;
    uint32_t own_ties = 0;
    for (uint32_t id = part.start + lane; id < part.end; id += WARP) {
        if (key_of(logits[id]) == kept.key) own_ties++;
        else own += kept.mass(logits[id]);
    }
    own = warp_total(own);
    own_ties = warp_total(own_ties);
    __syncthreads();
    if (lane == 0) {
        masses[warp] = own;
        ties[warp] = own_ties;
    }
    __syncthreads();
    const Mass each = kept.mass(logit_of(kept.key));
    Mass whole = 0;
    uint32_t ties_left = kept.ties;
    for (int other = 0; other < SAMPLE_WARPS; other++) {
        const uint32_t taken = min(uint32_t(ties[other]), ties_left);
        if (other == warp) {
            part.before = whole;
            part.ties_before = kept.ties - ties_left;
            own += taken * each;
        }
        ties_left -= taken;
        whole += masses[other] + taken * each;
    }
    const Mass target = min(Mass(uniform * double(whole)), whole - 1);
    if (target >= part.before && target < part.before + own) find(logits, kept, part, target, token);
}

// The largest key, and of equal ones the first id; above them all where none can be drawn.
__device__ Mass best_of(const float *logits, uint32_t vocab) {
    SHARED(Mass, room, SAMPLE_WARPS);
    Mass best = 0;
    for_each_logit(logits, vocab, [&](uint32_t id, float logit) {
        const bool broken = !(logit < INFINITY);
        best = max(best, broken ? ~Mass(0) : Mass(key_of(logit)) << 32 | (NO_TOKEN - id));
    });
    best = block_max(best, room);
    return best >> 32 == key_of(-INFINITY) ? ~Mass(0) : best;
}

KERNEL(sample, SampleArgs, SAMPLE_THREADS) {
    const Draw draw = args.draws[blockIdx.x];
    const float *logits = args.logits + size_t(draw.row) * args.vocab;
    uint32_t *token = args.tokens + blockIdx.x;
    const Mass best = best_of(logits, args.vocab);
    const uint32_t likeliest = NO_TOKEN - uint32_t(best);
    if (best == ~Mass(0) || draw.scale == 0.0f) {
        if (threadIdx.x == 0) *token = best == ~Mass(0) ? NO_TOKEN : likeliest;
        return;
    }
    const Weights weights = {logit_of(uint32_t(best >> 32)), draw.scale};
    pick(logits, args.vocab, kept_of(logits, args.vocab, draw, weights), draw.uniform, token);
}

// Ids and logits of the `top` likeliest of at least that many; of equal ones the first by id.
__device__ void list(const float *logits, uint32_t vocab, uint32_t top, uint32_t *out) {
    SHARED(Mass, room, SAMPLE_WARPS);
    SHARED(Mass, listed, 1);
    const Threshold last = threshold(logits, vocab, top, [](float) { return Mass(1); });
    if (threadIdx.x == 0) listed[0] = 0;
    __syncthreads();
    for_each_logit(logits, vocab, [&](uint32_t id, float logit) {
        if (key_of(logit) <= last.key) return;
        const uint32_t place = uint32_t(atomic_add(listed, 0, 1));
        out[2 * place] = id;
        out[2 * place + 1] = __float_as_uint(logit);
    });
    uint32_t next = 0;
    for (uint32_t place = uint32_t(last.above); place < top; place++) {
        Mass first = 0;  // larger for smaller ids
        for (uint32_t id = next + threadIdx.x; id < vocab && !first; id += SAMPLE_THREADS)
            if (key_of(logits[id]) == last.key) first = NO_TOKEN - id;
        const uint32_t id = NO_TOKEN - uint32_t(block_max(first, room));
        if (threadIdx.x == 0) {
            out[2 * place] = id;
            out[2 * place + 1] = __float_as_uint(logit_of(last.key));
        }
        next = id + 1;
    }
}

KERNEL(score, ScoreArgs, SAMPLE_THREADS) {
    SHARED(Mass, sums, 2);  // of weights, and larger logits
    const uint32_t *ask = args.asks + 3 * blockIdx.x;
    const uint32_t row = ask[0], token = args.tokens[ask[1]], top = ask[2];
    if (token == NO_TOKEN) return;
    const float *logits = args.logits + size_t(row) * args.vocab;
    const Weights weights = {logit_of(uint32_t(best_of(logits, args.vocab) >> 32)), 1.0f};
    if (threadIdx.x < 2) sums[threadIdx.x] = 0;
    __syncthreads();
    const float chosen = logits[token];
    Mass sum = 0, above = 0;
    for_each_logit(logits, args.vocab, [&](uint32_t, float logit) {
        sum += weights.mass(logit);
        above += logit > chosen;
    });
    sum = warp_total(sum);
    above = warp_total(above);
    if (threadIdx.x % WARP == 0) {
        atomic_add(sums, 0, sum);
        atomic_add(sums, 1, above);
    }
    __syncthreads();
    uint32_t *score = args.scores + size_t(blockIdx.x) * args.stride;
    if (threadIdx.x == 0) *reinterpret_cast<Score *>(score) = {sums[0], weights.max, chosen, uint32_t(sums[1]), token};
    if (top) list(logits, args.vocab, top, score + sizeof(Score) / sizeof(uint32_t));
}

struct FollowArgs {
    uint32_t *ids;           // [rows], places among `tokens` before, tokens after
    const uint32_t *tokens;
    uint32_t rows;
};

constexpr int FOLLOW_THREADS = 256;

// A row after no token is for nothing, yet it is computed.
KERNEL(follow, FollowArgs, FOLLOW_THREADS) {
    const uint32_t row = blockIdx.x * FOLLOW_THREADS + threadIdx.x;
    if (row >= args.rows) return;
    const uint32_t token = args.tokens[args.ids[row]];
    args.ids[row] = token == NO_TOKEN ? 0 : token;
}
