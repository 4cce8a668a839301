// What works on one row at a time: embedding, norms, gates, gathers.
#include "weights.cuh"

constexpr int ROW_THREADS = 256;

// How the numbers of a matrix are stored; of `embedding` in ops.rs.
enum Encoding : uint32_t { ENCODING_F32, ENCODING_F16, ENCODING_BF16, ENCODING_Q8_0, ENCODING_Q4_0, ENCODING_Q4_1 };

struct EmbeddingArgs {
    const void *table;     // [vocab, cols], or packed
    const uint32_t *ids;   // [rows]
    float *out;            // [rows, cols]
    uint32_t cols, encoding;
};

// A number of a packed matrix, from where weights.cuh says that it lies.
template <int FORMAT>
__device__ inline float packed_number(const EmbeddingArgs &args, uint32_t row, uint32_t col) {
    const size_t chunk = size_t(row / PANEL) * (args.cols / CHUNK) + col / CHUNK;
    const unsigned char *start = static_cast<const unsigned char *>(args.table) + chunk * chunk_bytes(FORMAT);
    const uint32_t g = row % 8, lower = row % PANEL / 8, lane = 4 * g + col % CHUNK / 8, k = col % 8;
    const unsigned char *scales = start + (FORMAT == Q8_0 ? 512 : 256) + 4 * g + 2 * lower;
    const float scale = to_float(*reinterpret_cast<const f16 *>(scales));
    if (FORMAT == Q8_0) return scale * (float(start[16 * lane + 8 * lower + k]) - 128.0f);
    const uint32_t eight = *reinterpret_cast<const uint32_t *>(start + 8 * lane + 4 * lower);
    const float number = float(eight >> (k / 2 * 4 + k % 2 * 16) & 15);
    if (FORMAT == Q4_0) return scale * (number - 8.0f);
    return scale * number + to_float(*reinterpret_cast<const f16 *>(scales + 32));
}

// out[row] = table[ids[row]]
KERNEL(embedding, EmbeddingArgs, ROW_THREADS) {
    const uint32_t id = args.ids[blockIdx.x];
    const size_t from = size_t(id) * args.cols;
    float *out = args.out + size_t(blockIdx.x) * args.cols;
    for (uint32_t i = threadIdx.x; i < args.cols; i += ROW_THREADS) {
        switch (args.encoding) {
        case ENCODING_F32: out[i] = static_cast<const float *>(args.table)[from + i]; break;
        case ENCODING_F16: out[i] = to_float(static_cast<const f16 *>(args.table)[from + i]); break;
        case ENCODING_BF16: out[i] = to_float(static_cast<const bf16 *>(args.table)[from + i]); break;
        case ENCODING_Q8_0: out[i] = packed_number<Q8_0>(args, id, i); break;
        case ENCODING_Q4_0: out[i] = packed_number<Q4_0>(args, id, i); break;
        default: out[i] = packed_number<Q4_1>(args, id, i);
        }
    }
}

struct RmsNormArgs {
    float *residual;      // [rows, cols]
    const void *x;        // [rows, cols], added to the residual first; null: nothing is
    const float *weight;  // [cols]
    void *out;            // [rows, cols]
    uint32_t cols;
    float eps;
};

constexpr uint32_t KEPT = 8;  // numbers of a row that a thread holds, so that their loads are under way together
constexpr uint32_t ROUND = KEPT * ROW_THREADS;

// visit(which of the thread's numbers, its column), for those from `first` on.
template <typename Visit>
__device__ inline void each_kept(uint32_t first, uint32_t cols, const Visit &visit) {
#pragma unroll
    for (uint32_t j = 0; j < KEPT; j++) {
        const uint32_t i = first + j * ROW_THREADS + threadIdx.x;
        if (i < cols) visit(j, i);
    }
}

// out = residual / sqrt(mean(residual²) + eps) · weight
template <typename T>
__device__ void add_rms_norm(const RmsNormArgs &args) {
    const size_t start = size_t(blockIdx.x) * args.cols;
    float *residual = args.residual + start;
    const T *x = static_cast<const T *>(args.x) + start;
    T *out = static_cast<T *>(args.out) + start;
    float value[KEPT] = {}, weight[KEPT] = {};
    T added[KEPT] = {};
    each_kept(0, args.cols, [&](uint32_t j, uint32_t i) { weight[j] = args.weight[i]; });
    await_previous();
    float squares = 0.0f;
    for (uint32_t first = 0; first < args.cols; first += ROUND) {
        each_kept(first, args.cols, [&](uint32_t j, uint32_t i) {
            value[j] = residual[i];
            if (args.x) added[j] = x[i];
        });
        each_kept(first, args.cols, [&](uint32_t j, uint32_t i) {
            if (args.x) {
                value[j] += to_float(added[j]);
                residual[i] = value[j];
            }
            squares += value[j] * value[j];
        });
    }
    squares = block_sum<ROW_THREADS / WARP>(squares);
    const float scale = 1.0f / sqrtf(squares / float(args.cols) + args.eps);
    for (uint32_t first = 0; first < args.cols; first += ROUND) {
        if (args.cols > ROUND) {
            each_kept(first, args.cols, [&](uint32_t j, uint32_t i) {
                value[j] = residual[i];
                weight[j] = args.weight[i];
            });
        }
        each_kept(first, args.cols, [&](uint32_t j, uint32_t i) { out[i] = from_float<T>(value[j] * scale * weight[j]); });
    }
}

EAGER_KERNEL(rms_norm_f32, RmsNormArgs, ROW_THREADS) { add_rms_norm<float>(args); }
EAGER_KERNEL(rms_norm_f16, RmsNormArgs, ROW_THREADS) { add_rms_norm<f16>(args); }
EAGER_KERNEL(rms_norm_bf16, RmsNormArgs, ROW_THREADS) { add_rms_norm<bf16>(args); }

struct GateArgs {
    void *out;         // [rows, width]
    const void *gate;  // [rows, gate_width], from its column `offset`
    uint32_t width, gate_width, offset;
};

// out *= sigmoid(gate). Grid: rows × columns by ROW_THREADS.
template <typename T>
__device__ void gate_attention(const GateArgs &args) {
    T *out = static_cast<T *>(args.out) + size_t(blockIdx.x) * args.width;
    const T *gate = static_cast<const T *>(args.gate) + size_t(blockIdx.x) * args.gate_width + args.offset;
    const uint32_t i = blockIdx.y * ROW_THREADS + threadIdx.x;
    if (i < args.width) out[i] = from_float<T>(to_float(out[i]) * sigmoid(to_float(gate[i])));
}

KERNEL(gate_attention_f32, GateArgs, ROW_THREADS) { gate_attention<float>(args); }
KERNEL(gate_attention_f16, GateArgs, ROW_THREADS) { gate_attention<f16>(args); }
KERNEL(gate_attention_bf16, GateArgs, ROW_THREADS) { gate_attention<bf16>(args); }

struct GatedActivationArgs {
    const void *x;  // [rows, 2 * width]
    void *out;      // [rows, width]
    uint32_t width;
};

// out = silu(x[:width]) · x[width:]
template <typename T>
__device__ void gated_activation(const GatedActivationArgs &args) {
    const T *x = static_cast<const T *>(args.x) + size_t(blockIdx.x) * 2 * args.width;
    T *out = static_cast<T *>(args.out) + size_t(blockIdx.x) * args.width;
    for (uint32_t i = blockIdx.y * ROW_THREADS + threadIdx.x; i < args.width; i += gridDim.y * ROW_THREADS) {
        out[i] = gated(x[i], x[args.width + i]);
    }
}

KERNEL(gated_activation_f32, GatedActivationArgs, ROW_THREADS) { gated_activation<float>(args); }
KERNEL(gated_activation_f16, GatedActivationArgs, ROW_THREADS) { gated_activation<f16>(args); }
KERNEL(gated_activation_bf16, GatedActivationArgs, ROW_THREADS) { gated_activation<bf16>(args); }

struct GatherArgs {
    const void *x;          // [all rows, row_bytes / 4] words
    const uint32_t *rows;   // [rows]
    void *out;              // [rows, row_bytes / 4] words
    uint32_t words;
};

// out[row] = x[rows[row]]
KERNEL(gather_rows, GatherArgs, ROW_THREADS) {
    const uint32_t *x = static_cast<const uint32_t *>(args.x) + size_t(args.rows[blockIdx.x]) * args.words;
    uint32_t *out = static_cast<uint32_t *>(args.out) + size_t(blockIdx.x) * args.words;
    for (uint32_t i = threadIdx.x; i < args.words; i += ROW_THREADS) out[i] = x[i];
}
