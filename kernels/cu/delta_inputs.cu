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
// The way back (`delta_inputs_back`) computes u, y and the norms again and writes the gradients of fused and ba:
//
//   dy    = (dq − y (y · dq) r²) r, r = 1 / sqrt(Σ y² + eps), of q and k; dv of v
//   du    = dy · σ(u) (1 + u (1 − σ(u)))       dx[t] = Σ_{j < 4} w[j] · du[t + 3 − j]       rows of the document
//   dfused = dx and dz                          da = dg · (−e^a_log) · σ(a + bias)           db = dβ · β (1 − β)
//
// It reads fused and the gradients once and writes as much as fused: 3 s T Hk (2 Dk + 2 G Dv).
//
// Decomposition: a thread has a pack of eight channels of q, k, v or z and walks down a strip of STRIP rows with the last four
// inputs in registers, so each is read once. A head of q or k is Dk / 8 neighbouring lanes, a power of two of them, which sum
// their squares by shuffles. A few more blocks in x do the gates, a thread a head. The way back walks down likewise, three rows
// further, and keeps du of the last four rows: at the seams of strips three of 35 rows are computed twice.
//
// Numerics: f32; y, and the gradient of y, are rounded to the activations' type where the separate kernels would have stored them:
// the same bits as theirs.

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

// The taps of a pack of channels; z has none.
template <class W>
DEVICE void load_taps(f32 (&taps)[TAPS][PACK], const W* weight, Part part, i32 channel) {
#pragma unroll
    for (i32 j = 0; j < TAPS; j++)
#pragma unroll
        for (i32 i = 0; i < PACK; i++) taps[j][i] = part == GATE ? 0.0f : to_f32(weight[(i64(channel) + i) * TAPS + j]);
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
    load_taps(taps, part == QUERY ? query_taps : part == KEY ? key_taps : value_taps, part, channel);
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

// ---- the way back --------------------------------------------------------------------------------------------------

template <class A>
DEVICE void close_gates(const A* ba, const f32* a_log, const f32* bias, const f32* beta, const f32* ddecay, const f32* dbeta,
                        A* dba, const Layout& layout, i32 head, i32 first, i32 end) {
    if (head >= layout.value_heads) return;
    i32 ratio = layout.value_heads / layout.key_heads, column = head / ratio * 2 * ratio + head % ratio;
    for (i32 t = first; t < end; t++) {
        i64 row = i64(t) * 2 * layout.value_heads, at = i64(t) * layout.value_heads + head;
        f32 a = to_f32(ba[row + column + ratio]);
        dba[row + column + ratio] = from_f32<A>(ddecay[at] * -expf(a_log[head]) * logistic(a + bias[head]));
        dba[row + column] = from_f32<A>(dbeta[at] * beta[at] * (1.0f - beta[at]));
    }
}

// A row's du, from its last TAPS inputs and the gradient of what became of them. All lanes of a head call it together.
template <class A>
DEVICE Pack activation_gradient(const Pack (&window)[TAPS], const f32 (&taps)[TAPS][PACK], Pack dy, bool is_unit, i32 key_dim,
                                f32 eps) {
    Pack u = {}, sigma, y;
    f32 squares = 0.0f, along = 0.0f;
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
#pragma unroll
        for (i32 j = 0; j < TAPS; j++) u.at[i] += taps[j][i] * window[j].at[i];
        sigma.at[i] = logistic(u.at[i]);
        y.at[i] = rounded<A>(u.at[i] * sigma.at[i]);
        squares += y.at[i] * y.at[i];
        along += y.at[i] * dy.at[i];
    }
    for (i32 step = key_dim / PACK / 2; step > 0; step /= 2) {
        squares += lane_across(squares, step);
        along += lane_across(along, step);
    }
    f32 r = 1.0f / sqrtf(squares + eps), pull = r * r * along;
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
        if (is_unit) dy.at[i] = rounded<A>(r * (dy.at[i] - y.at[i] * pull));
        dy.at[i] *= sigma.at[i] * (1.0f + u.at[i] * (1.0f - sigma.at[i]));
    }
    return dy;
}

template <class A, class W>
DEVICE void delta_inputs_back(const A* fused, const A* ba, const W* query_taps, const W* key_taps, const W* value_taps,
                              const f32* a_log, const f32* bias, const i32* offsets, const f32* beta, const A* dq, const A* dk,
                              const A* dv, const A* dz, const f32* ddecay, const f32* dbeta, A* dfused, A* dba,
                              const Layout& layout, i32 tokens, i32 documents, i32 gate_blocks, f32 eps) {
    i32 first = i32(blockIdx.y) * STRIP, end = min(first + STRIP, tokens);
    i32 block = i32(blockIdx.x) - gate_blocks;
    if (block < 0) {
        i32 head = i32(blockIdx.x) * THREADS + i32(threadIdx.x);
        close_gates(ba, a_log, bias, beta, ddecay, dbeta, dba, layout, head, first, end);
        return;
    }
    Part part;
    i32 channel;
    // All lanes go on, those without channels too: they take part in sums.
    bool exists = find_part(layout, (block * THREADS + i32(threadIdx.x)) * PACK, part, channel);
    if (!exists) part = VALUE, channel = 0;
    i64 row_width = layout.key_heads * layout.stride();
    const A* x = fused + column_of(layout, part, channel);
    A* dx = dfused + column_of(layout, part, channel);
    f32 taps[TAPS][PACK];
    load_taps(taps, part == QUERY ? query_taps : part == KEY ? key_taps : value_taps, part, channel);
    const A* dy = (part == QUERY ? dq : part == KEY ? dk : part == VALUE ? dv : dz) + channel;
    i64 dy_width = part <= KEY ? layout.keys() : layout.values();
    i32 document = document_of(offsets, documents, first);
    while (offsets[document + 1] <= first) document++;
    i32 written_end = offsets[document + 1];  // of the document of the row that is written next
    i32 written = document;
    // The last rows' inputs and their du, oldest first; rows beyond the strip on both sides are another strip's too.
    Pack window[TAPS], du[TAPS];
#pragma unroll
    for (i32 j = 0; j < TAPS; j++) {
        i32 source = first - TAPS + j;
        window[j] = {}, du[j] = {};
        if (j > 0 && source >= offsets[document]) load_wide(window[j], x + source * row_width);
    }
    for (i32 t = first; t < end + TAPS - 1; t++) {
#pragma unroll
        for (i32 j = 0; j + 1 < TAPS; j++) window[j] = window[j + 1], du[j] = du[j + 1];
        Pack gradient = {};
        if (t < tokens) {
            while (offsets[document + 1] <= t) document++;
#pragma unroll
            for (i32 j = 0; j + 1 < TAPS; j++)
                if (offsets[document] == t) window[j] = {};
            load_wide(window[TAPS - 1], x + t * row_width);
            load_wide(gradient, dy + t * dy_width);
        }
        du[TAPS - 1] = part == GATE ? gradient : Pack{};
        Pack of_row = activation_gradient<A>(window, taps, gradient, part <= KEY, layout.key_dim, eps);
        if (part != GATE) du[TAPS - 1] = of_row;
        i32 row = t - (TAPS - 1);
        if (row < first) continue;
        while (written_end <= row) written_end = offsets[++written + 1];
        Pack sum = part == GATE ? du[0] : Pack{};
#pragma unroll
        for (i32 i = 0; i < TAPS; i++)
#pragma unroll
            for (i32 e = 0; e < PACK; e++)
                if (row + i < written_end && part != GATE) sum.at[e] += taps[TAPS - 1 - i][e] * du[i].at[e];
        if (exists) store_wide(dx + row * row_width, sum);
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
    }                                                                                                                        \
    ENTRY(THREADS, 3)                                                                                                        \
    delta_inputs_back_##A##_##W(const A* __restrict__ fused, const A* __restrict__ ba, const W* __restrict__ query_taps,     \
                                const W* __restrict__ key_taps, const W* __restrict__ value_taps,                            \
                                const f32* __restrict__ a_log, const f32* __restrict__ bias,                                 \
                                const i32* __restrict__ offsets, const f32* __restrict__ beta, const A* __restrict__ dq,     \
                                const A* __restrict__ dk, const A* __restrict__ dv, const A* __restrict__ dz,                \
                                const f32* __restrict__ ddecay, const f32* __restrict__ dbeta, A* __restrict__ dfused,       \
                                A* __restrict__ dba, i32 key_heads, i32 value_heads, i32 key_dim, i32 value_dim,             \
                                i32 tokens, i32 documents, i32 gate_blocks, f32 eps) {                                       \
        delta_inputs_back<A, W>(fused, ba, query_taps, key_taps, value_taps, a_log, bias, offsets, beta, dq, dk, dv, dz,     \
                                ddecay, dbeta, dfused, dba, Layout{key_heads, value_heads, key_dim, value_dim}, tokens,      \
                                documents, gate_blocks, eps);                                                                \
    }
DELTA_INPUTS(f32, f32)
DELTA_INPUTS(f32, bf16)
DELTA_INPUTS(bf16, f32)
DELTA_INPUTS(bf16, bf16)
