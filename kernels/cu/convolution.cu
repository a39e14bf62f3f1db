// Causal convolution of each channel by itself, then SiLU, over packed documents (Qwen3-Next's short convolution, K = 4).
//
//   z[t] = bias + Σ_{j < K} w[j] · x[t − (K − 1) + j]     y = z σ(z)            rows before the document: zero, or its state
//   dz   = dy · σ(z) (1 + z (1 − σ(z)))                    dx[t] = Σ_{j < K} w[j] · dz[t + (K − 1) − j]   rows of the document
//
// Tensors: x, y, dy, dx [T, C] activations; weight [C, K] f32 or bf16; bias f32 [C]; offsets i32 [documents + 1];
// state f32 [documents, K − 1, C], oldest row first.
//
// Bytes, for activations of s bytes: 2 s T C forward, 3 s T C backward. Limited by memory.
//
// Decomposition: a thread has a pack of eight channels and walks down a strip of STRIP rows; the threads of a warp are neighbours
// in channels, so each access of a warp is 512 bytes of a row. The K − 1 rows that a row shares with the one above come from the
// first level of cache, where the same thread has just brought them. Entries `taps4` have K as a constant and the thread's
// weights in registers; the others read them again and take any K. The backward pass keeps dz of the last K rows in registers
// (`taps4`), or computes it K times.
// At the seams of strips K − 1 rows are computed twice, 3 of 35 for K = 4.
//
// Numerics: f32 sums from the oldest tap to the newest, after the bias; one rounding when stored.

#include "documents.cuh"

constexpr i32 THREADS = 128;
constexpr i32 STRIP = 32;

template <class A, class W>
struct Convolution {
    const A* x;
    const W* weight;
    const f32* bias;   // or null
    const f32* state;  // or null
    i32 tokens, channels, taps;

    DEVICE Pack row(const A* rows, i32 t, i32 channel) const {
        return load_pack(rows + i64(t) * channels, channel, channels, channels % PACK == 0);
    }
    DEVICE f32 tap(i32 channel, i32 j) const {
        return channel < channels ? to_f32(weight[i64(channel) * taps + j]) : 0.0f;
    }
    DEVICE Pack begin(i32 channel) const {
        Pack z;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) z.at[i] = 0.0f;
        return bias == nullptr ? z : load_pack(bias, channel, channels, true);
    }
};

// The weights of a pack of channels: in registers where their number is a constant.
template <i32 TAPS>
struct Taps {
    f32 at[TAPS][PACK];

    template <class A, class W>
    DEVICE void load(const Convolution<A, W>& of, i32 channel) {
#pragma unroll
        for (i32 j = 0; j < TAPS; j++)
#pragma unroll
            for (i32 i = 0; i < PACK; i++) at[j][i] = of.tap(channel + i, j);
    }
    template <class A, class W>
    DEVICE void multiply(Pack& sum, const Pack& pack, const Convolution<A, W>&, i32, i32 j) const {
#pragma unroll
        for (i32 i = 0; i < PACK; i++) sum.at[i] += at[j][i] * pack.at[i];
    }
};
template <>
struct Taps<0> {
    template <class A, class W>
    DEVICE void load(const Convolution<A, W>&, i32) {}
    template <class A, class W>
    DEVICE void multiply(Pack& sum, const Pack& pack, const Convolution<A, W>& of, i32 channel, i32 j) const {
#pragma unroll
        for (i32 i = 0; i < PACK; i++) sum.at[i] += of.tap(channel + i, j) * pack.at[i];
    }
};

// z of row t of a document that begins at row `start`; `past` are the rows before it, or null.
template <i32 TAPS, class A, class W>
DEVICE Pack preactivation(const Convolution<A, W>& of, const Taps<TAPS>& taps, const f32* past, i32 t, i32 start, i32 channel) {
    const i32 count = TAPS ? TAPS : of.taps;
    Pack z = of.begin(channel);
#pragma unroll
    for (i32 j = 0; j < count; j++) {
        i32 source = t - (count - 1) + j;
        if (source >= start) {
            taps.multiply(z, of.row(of.x, source, channel), of, channel, j);
        } else if (past != nullptr) {
            i64 kept = i64(t + j - start) * of.channels;
            taps.multiply(z, load_pack(past + kept, channel, of.channels, of.channels % PACK == 0), of, channel, j);
        }
    }
    return z;
}

// This thread's channels and strip of rows; whether it has any.
template <class A, class W>
DEVICE bool find_strip(const Convolution<A, W>& of, i32& channel, i32& first, i32& end) {
    i32 packs = (of.channels + PACK - 1) / PACK;
    i64 thread = global_thread();
    channel = i32(thread % packs) * PACK;
    i64 row = thread / packs * STRIP;
    if (row >= of.tokens) return false;
    first = i32(row);
    end = min(first + STRIP, of.tokens);
    return true;
}

template <i32 TAPS, class A, class W>
DEVICE void convolution_forward(Convolution<A, W> of, const i32* offsets, A* y, i32 documents) {
    i32 channel, t, end;
    if (!find_strip(of, channel, t, end)) return;
    Taps<TAPS> taps;
    taps.load(of, channel);
    i32 document = document_of(offsets, documents, t);
    for (; t < end; t++) {
        while (offsets[document + 1] <= t) document++;
        const f32* past = of.state == nullptr ? nullptr : of.state + i64(document) * (of.taps - 1) * of.channels;
        Pack z = preactivation(of, taps, past, t, offsets[document], channel);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) z.at[i] *= logistic(z.at[i]);
        store_pack(y + i64(t) * of.channels, channel, of.channels, of.channels % PACK == 0, z);
    }
}

template <i32 TAPS, class A, class W>
DEVICE Pack activation_gradient(const Convolution<A, W>& of, const Taps<TAPS>& taps, const A* dy, i32 t, i32 start,
                                i32 channel) {
    Pack z = preactivation(of, taps, nullptr, t, start, channel);
    Pack dz = of.row(dy, t, channel);
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
        f32 sigma = logistic(z.at[i]);
        dz.at[i] *= sigma * (1.0f + z.at[i] * (1.0f - sigma));
    }
    return dz;
}

// dz of the rows t.. that reach dx[t]: at[i] is that of row t + i. Each is computed once, when it comes into sight.
template <i32 TAPS>
struct Window {
    Pack at[TAPS];
    i32 document_end = 0;  // of the document that `at` is of

    template <class A, class W>
    DEVICE Pack gradient(const Convolution<A, W>& of, const Taps<TAPS>& taps, const A* dy, i32 t, i32 start, i32 end,
                         i32 channel) {
        bool entered = document_end != end;
        document_end = end;
        if (!entered) {
#pragma unroll
            for (i32 i = 0; i + 1 < TAPS; i++) at[i] = at[i + 1];
        }
        Pack dx;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) dx.at[i] = 0.0f;
#pragma unroll
        for (i32 i = 0; i < TAPS; i++) {
            if (t + i >= end) continue;
            if (entered || i == TAPS - 1) at[i] = activation_gradient(of, taps, dy, t + i, start, channel);
            taps.multiply(dx, at[i], of, channel, TAPS - 1 - i);
        }
        return dx;
    }
};
template <>
struct Window<0> {
    template <class A, class W>
    DEVICE Pack gradient(const Convolution<A, W>& of, const Taps<0>& taps, const A* dy, i32 t, i32 start, i32 end,
                         i32 channel) {
        Pack dx;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) dx.at[i] = 0.0f;
        for (i32 i = 0; i < of.taps && t + i < end; i++) {
            Pack dz = activation_gradient(of, taps, dy, t + i, start, channel);
            taps.multiply(dx, dz, of, channel, of.taps - 1 - i);
        }
        return dx;
    }
};

template <i32 TAPS, class A, class W>
DEVICE void convolution_backward(Convolution<A, W> of, const i32* offsets, const A* dy, A* dx, i32 documents) {
    i32 channel, t, end;
    if (!find_strip(of, channel, t, end)) return;
    Taps<TAPS> taps;
    taps.load(of, channel);
    Window<TAPS> window;
    i32 document = document_of(offsets, documents, t);
    for (; t < end; t++) {
        while (offsets[document + 1] <= t) document++;
        Pack gradient = window.gradient(of, taps, dy, t, offsets[document], offsets[document + 1], channel);
        store_pack(dx + i64(t) * of.channels, channel, of.channels, of.channels % PACK == 0, gradient);
    }
}

// The state behind each document: the last K − 1 rows of the old state and the document's inputs together. A thread has a
// document and a channel and moves the rows in rising order, in place.
template <class A>
DEVICE void convolution_state(const A* x, const i32* offsets, f32* state, i32 documents, i32 channels, i32 taps) {
    i64 thread = global_thread();
    if (thread >= i64(documents) * channels) return;
    i32 document = i32(thread / channels), channel = i32(thread % channels);
    i32 past = taps - 1, start = offsets[document], length = offsets[document + 1] - start;
    f32* own = state + i64(document) * past * channels + channel;
    for (i32 i = 0; i < past; i++) {
        i32 source = i + length;
        own[i64(i) * channels] = source < past ? own[i64(source) * channels]
                                               : to_f32(x[(i64(start) + source - past) * channels + channel]);
    }
}

#define CONVOLUTION(layout, TAPS, A, W)                                                                                      \
    ENTRY(THREADS, 4)                                                                                                        \
    convolution_forward_##layout##_##A##_##W(const A* __restrict__ x, const W* __restrict__ weight,                          \
                                             const f32* __restrict__ bias, const i32* __restrict__ offsets,                    \
                                             const f32* __restrict__ state, A* __restrict__ y, i32 tokens, i32 channels,     \
                                             i32 taps, i32 documents) {                                                      \
        convolution_forward<TAPS>(Convolution<A, W>{x, weight, bias, state, tokens, channels, taps}, offsets, y, documents); \
    }                                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    convolution_backward_##layout##_##A##_##W(const A* __restrict__ x, const W* __restrict__ weight,                         \
                                              const f32* __restrict__ bias, const i32* __restrict__ offsets,                   \
                                              const A* __restrict__ dy, A* __restrict__ dx, i32 tokens, i32 channels,        \
                                              i32 taps, i32 documents) {                                                     \
        convolution_backward<TAPS>(Convolution<A, W>{x, weight, bias, nullptr, tokens, channels, taps}, offsets, dy, dx,     \
                                   documents);                                                                               \
    }
CONVOLUTION(taps4, 4, f32, f32)
CONVOLUTION(taps4, 4, f32, bf16)
CONVOLUTION(taps4, 4, bf16, f32)
CONVOLUTION(taps4, 4, bf16, bf16)
CONVOLUTION(any, 0, f32, f32)
CONVOLUTION(any, 0, f32, bf16)
CONVOLUTION(any, 0, bf16, f32)
CONVOLUTION(any, 0, bf16, bf16)

#define STATE(A)                                                                                                             \
    ENTRY(THREADS)                                                                                                           \
    convolution_state_##A(const A* __restrict__ x, const i32* __restrict__ offsets, f32* __restrict__ state, i32 documents,  \
                          i32 channels, i32 taps) {                                                                          \
        convolution_state<A>(x, offsets, state, documents, channels, taps);                                                  \
    }
STATE(f32)
STATE(bf16)
