// Everything between DeltaNet's two input projections and its delta rule, in one launch: the fused projections cut apart, the short
// causal convolution and SiLU of q, k and v, the l2 norm of q's and k's heads, and the gates (Qwen3-Next; K = 4 taps).
//
//   u[t]  = Σ_{j < 4} w[j] · x[t − 3 + j]     y = u σ(u)                        rows before the document: zero
//   q, k  = y / sqrt(Σ y² + eps) over a head   v = y                            z = x
//   g     = −e^a_log · softplus(a + bias)      β = σ(b)
//
// Tensors: fused [T, Hk (2 Dk + 2 G Dv)] activations, for each key head its q and k, then v and z of its G value heads; ba
// [T, 2 Hk G], for each key head b and then a of its value heads; w f32 or bf16 [channels, 4] of q, k and v; a_log, bias f32 [Hv];
// offsets i32 [documents + 1]. Out: q, k [T, Hk, Dk], v, z [T, Hv, Dv] activations; g, β f32 [T, Hv].
//
// Bytes, for activations of s bytes: fused and ba read once, as much written: 2 s T Hk (2 Dk + 2 G Dv). Cutting, convolving and
// normalising one after another moves 5 s T Hk 2 Dk + 4 s T Hk G Dv + …: more than twice that. Limited by memory.
//
// Decomposition: a thread has a pack of eight channels of q, k, v or z and walks down a strip of STRIP rows with the last four
// inputs in registers, so each is read once. A head of q or k is Dk / 8 neighbouring lanes, a power of two of them, which sum
// their squares by shuffles. A few more blocks in x do the gates, a thread a head.
//
// Numerics: f32; y is rounded to the activations' type before its norm is taken and before it is divided, as if it had been stored:
// the same bits as of the separate kernels.

#include "documents.cuh"

constexpr i32 THREADS = 128;
constexpr i32 STRIP = 32;
constexpr i32 TAPS = 4;

// Where the channels of the fused projection lie.
struct Layout {
    i32 key_heads, value_heads, key_dim, value_dim;

    DEVICE i32 keys() const { return key_heads * key_dim; }
    DEVICE i32 values() const { return value_heads * value_dim; }
    DEVICE i32 group() const { return value_heads / key_heads * value_dim; }
    DEVICE i32 stride() const { return 2 * key_dim + 2 * group(); }
};

// One of q, k, v and z: its channels' width in a key head and where they begin there, and what becomes of them.
enum Part { QUERY, KEY, VALUE, GATE };

// The part and channel of a pack of the four in their order; false beyond them.
DEVICE bool find_part(const Layout& layout, i32 channel, Part& part, i32& within) {
    i32 ends[4] = {layout.keys(), 2 * layout.keys(), 2 * layout.keys() + layout.values(), 2 * layout.keys() + 2 * layout.values()};
    part = channel < ends[0] ? QUERY : channel < ends[1] ? KEY : channel < ends[2] ? VALUE : GATE;
    within = channel - (part == QUERY ? 0 : ends[part - 1]);
    return channel < ends[3];
}

// Column of a row of the fused projection.
DEVICE i32 column_of(const Layout& layout, Part part, i32 channel) {
    i32 width = part <= KEY ? layout.key_dim : layout.group();
    i32 begin = part == QUERY ? 0 : part == KEY ? layout.key_dim : 2 * layout.key_dim + (part == GATE ? layout.group() : 0);
    return channel / width * layout.stride() + begin + channel % width;
}

// ln(1 + e^x), without overflow.
DEVICE f32 softplus(f32 x) { return x > 0.0f ? x + log1pf(expf(-x)) : log1pf(expf(x)); }

template <class A>
DEVICE void open_gates(const A* ba, const f32* a_log, const f32* bias, f32* decay, f32* beta, const Layout& layout, i32 head,
                       i32 first, i32 end) {
    if (head >= layout.value_heads) return;
    i32 ratio = layout.value_heads / layout.key_heads, column = head / ratio * 2 * ratio + head % ratio;
    for (i32 t = first; t < end; t++) {
        i64 row = i64(t) * 2 * layout.value_heads, at = i64(t) * layout.value_heads + head;
        decay[at] = -expf(a_log[head]) * softplus(to_f32(ba[row + column + ratio]) + bias[head]);
        beta[at] = logistic(to_f32(ba[row + column]));
    }
}

template <class A, class W>
DEVICE void delta_inputs(const A* fused, const A* ba, const W* query_taps, const W* key_taps, const W* value_taps,
                         const f32* a_log, const f32* bias, const i32* offsets, A* q, A* k, A* v, A* z, f32* decay, f32* beta,
                         const Layout& layout, i32 tokens, i32 documents, i32 gate_blocks, f32 eps) {
    i32 t = i32(blockIdx.y) * STRIP, end = min(t + STRIP, tokens);
    i32 block = i32(blockIdx.x) - gate_blocks;
    if (block < 0) {
        open_gates(ba, a_log, bias, decay, beta, layout, i32(blockIdx.x) * THREADS + i32(threadIdx.x), t, end);
        return;
    }
    Part part;
    i32 channel;
    // All lanes go on, those without channels too: they take part in sums.
    bool exists = find_part(layout, (block * THREADS + i32(threadIdx.x)) * PACK, part, channel);
    if (!exists) part = VALUE, channel = 0;
    i32 row_width = layout.key_heads * layout.stride();
    const A* x = fused + column_of(layout, part, channel);
    f32 taps[TAPS][PACK];
    const W* weight = part == QUERY ? query_taps : part == KEY ? key_taps : value_taps;
#pragma unroll
    for (i32 j = 0; j < TAPS; j++)
#pragma unroll
        for (i32 i = 0; i < PACK; i++) taps[j][i] = part == GATE ? 0.0f : to_f32(weight[(i64(channel) + i) * TAPS + j]);
    A* out = part == QUERY ? q : part == KEY ? k : part == VALUE ? v : z;
    i32 out_width = part <= KEY ? layout.keys() : layout.values();
    i32 document = document_of(offsets, documents, t);
    while (offsets[document + 1] <= t) document++;
    // The last rows' inputs, oldest first; the rows above the strip are another strip's, read again.
    Pack window[TAPS];
#pragma unroll
    for (i32 j = 0; j + 1 < TAPS; j++) {
        i32 source = t - (TAPS - 1) + j;
        window[j + 1] = {};
        if (source >= offsets[document]) load_wide(window[j + 1], x + i64(source) * row_width);
    }
    for (; t < end; t++) {
        while (offsets[document + 1] <= t) document++;
        bool begins = offsets[document] == t;
#pragma unroll
        for (i32 j = 0; j + 1 < TAPS; j++) {
            window[j] = window[j + 1];
            if (begins) window[j] = {};
        }
        load_wide(window[TAPS - 1], x + i64(t) * row_width);
        Pack y = {};
        f32 squares = 0.0f;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
#pragma unroll
            for (i32 j = 0; j < TAPS; j++) y.at[i] += taps[j][i] * window[j].at[i];
            y.at[i] = rounded<A>(y.at[i] * logistic(y.at[i]));
            squares += y.at[i] * y.at[i];
        }
        for (i32 step = layout.key_dim / PACK / 2; step > 0; step /= 2) squares += lane_across(squares, step);
        f32 scale = part <= KEY ? 1.0f / sqrtf(squares + eps) : 1.0f;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) y.at[i] = part == GATE ? window[TAPS - 1].at[i] : y.at[i] * scale;
        if (exists) store_wide(out + i64(t) * out_width + channel, y);
    }
}

#define DELTA_INPUTS(A, W)                                                                                                   \
    ENTRY(THREADS, 4)                                                                                                        \
    delta_inputs_##A##_##W(const A* __restrict__ fused, const A* __restrict__ ba, const W* __restrict__ query_taps,          \
                           const W* __restrict__ key_taps, const W* __restrict__ value_taps, const f32* __restrict__ a_log,  \
                           const f32* __restrict__ bias, const i32* __restrict__ offsets, A* __restrict__ q,                 \
                           A* __restrict__ k, A* __restrict__ v, A* __restrict__ z, f32* __restrict__ decay,                 \
                           f32* __restrict__ beta, i32 key_heads, i32 value_heads, i32 key_dim, i32 value_dim, i32 tokens,   \
                           i32 documents, i32 gate_blocks, f32 eps) {                                                        \
        delta_inputs<A, W>(fused, ba, query_taps, key_taps, value_taps, a_log, bias, offsets, q, k, v, z, decay, beta,       \
                           Layout{key_heads, value_heads, key_dim, value_dim}, tokens, documents, gate_blocks, eps);         \
    }
DELTA_INPUTS(f32, f32)
DELTA_INPUTS(f32, bf16)
DELTA_INPUTS(bf16, f32)
DELTA_INPUTS(bf16, bf16)
