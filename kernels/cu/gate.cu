// Gates, and the norms that go with them.
//
//   sigmoid gate   y = x · σ(g)                  dx = dy · σ(g)      dg = dy · x · σ(g) (1 − σ(g)), summed over a row with one g
//   gated norm     r = 1 / sqrt(mean(x²) + eps)  n = x · r · w       y = n · silu(z)
//                  dz = dy · n · σ(z) (1 + z (1 − σ(z)))             h = dy · silu(z) · w    dx = r (h − x · r² · mean(h · x))
//   l2 norm        r = 1 / sqrt(Σ x² + eps)      y = x · r           dx = r (dy − x · r² · Σ dy · x)
//   delta gates    g = −e^a_log · softplus(a + bias)                 da = dg · (−e^a_log) · σ(a + bias)
//                  β = σ(b)                                          db = dβ · β (1 − β)
//
// Tensors: x, y, z, dy, … [N, C] activations; a gate is [N, C] or [N, 1]; w [C] f32 or bf16; a_log and bias f32 [heads]; r f32 [N];
// g, β and their gradients f32 [T, heads]; a, b, da, db activations [T, heads].
//
// Bytes: every operand once; the row kernels read theirs twice, the second time from the first level of cache. Limited by memory.
//
// Decomposition: the element-wise kernels give a thread a pack of eight elements; where a whole row is summed, a warp has a row,
// whatever its length: the rows of these ops are heads of 64 to 256 elements (the shared expert's gate has one of 2048).
//
// Numerics: f32 on widened operands, one rounding when stored. A thread sums its packs in rising order, then the lanes as a tree.
// eps keeps r finite for a row of zeros; the backward passes use the forward pass's r, so they stay finite too.

#include "common.cuh"

constexpr i32 THREADS = 256;
constexpr i32 LANE_STEP = WARP_LANES * PACK;

// The row of this warp; whether it exists.
DEVICE bool find_row(i64 rows, i64& row) {
    row = i64(blockIdx.x) * (THREADS / WARP_LANES) + warp_index();
    return row < rows;
}

DEVICE f32 dot(const Pack& a, const Pack& b) {
    f32 sum = 0.0f;
#pragma unroll
    for (i32 i = 0; i < PACK; i++) sum += a.at[i] * b.at[i];
    return sum;
}

// ---- sigmoid gate --------------------------------------------------------------------------------------------------

// Gates of the elements from `first` on.
template <class A>
DEVICE Pack load_gates(const A* gate, i64 first, i64 count, i32 width, i32 per_row) {
    if (!per_row) return load_pack(gate, first, count, true);
    Pack pack;
    i64 row = first / width;
    i32 column = i32(first - row * width);
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
        pack.at[i] = first + i < count ? to_f32(gate[row]) : 0.0f;
        if (++column == width) row++, column = 0;
    }
    return pack;
}

template <class A>
DEVICE void sigmoid_gate_forward(const A* x, const A* gate, A* y, i64 count, i32 width, i32 per_row, i32 accumulate) {
    i64 first = global_thread() * PACK;
    if (first >= count) return;
    Pack result = load_pack(x, first, count, true);
    Pack gates = load_gates(gate, first, count, width, per_row);
#pragma unroll
    for (i32 i = 0; i < PACK; i++) result.at[i] *= logistic(gates.at[i]);
    if (accumulate) {
        Pack old = load_pack(y, first, count, true);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) result.at[i] += old.at[i];
    }
    store_pack(y, first, count, true, result);
}

template <class A>
DEVICE void sigmoid_gate_backward_each(const A* x, const A* gate, const A* dy, A* dx, A* dgate, i64 count) {
    i64 first = global_thread() * PACK;
    if (first >= count) return;
    Pack value = load_pack(x, first, count, true);
    Pack gates = load_pack(gate, first, count, true);
    Pack gradient = load_pack(dy, first, count, true);
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
        f32 sigma = logistic(gates.at[i]);
        value.at[i] = gradient.at[i] * value.at[i] * sigma * (1.0f - sigma);
        gradient.at[i] *= sigma;
    }
    store_pack(dx, first, count, true, gradient);
    store_pack(dgate, first, count, true, value);
}

template <class A>
DEVICE void sigmoid_gate_backward_row(const A* x, const A* gate, const A* dy, A* dx, A* dgate, i64 rows, i32 width) {
    i64 row;
    if (!find_row(rows, row)) return;
    bool aligned = width % PACK == 0;
    x += row * width, dy += row * width, dx += row * width;
    f32 sigma = logistic(to_f32(gate[row]));
    f32 sum = 0.0f;
    for (i32 first = lane_index() * PACK; first < width; first += LANE_STEP) {
        Pack gradient = load_pack(dy, first, width, aligned);
        sum += dot(gradient, load_pack(x, first, width, aligned));
#pragma unroll
        for (i32 i = 0; i < PACK; i++) gradient.at[i] *= sigma;
        store_pack(dx, first, width, aligned, gradient);
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) dgate[row] = from_f32<A>(sum * sigma * (1.0f - sigma));
}

// ---- norms ---------------------------------------------------------------------------------------------------------

template <class A, class W>
DEVICE void gated_norm_forward(const A* x, const A* gate, const W* weight, A* y, f32* rstd, i64 rows, i32 width, f32 eps) {
    i64 row;
    if (!find_row(rows, row)) return;
    bool aligned = width % PACK == 0;
    x += row * width, gate += row * width, y += row * width;
    f32 squares = 0.0f;
    for (i32 first = lane_index() * PACK; first < width; first += LANE_STEP) {
        Pack pack = load_pack(x, first, width, aligned);
        squares += dot(pack, pack);
    }
    f32 r = 1.0f / sqrtf(warp_sum(squares) / f32(width) + eps);
    if (lane_index() == 0) rstd[row] = r;
    for (i32 first = lane_index() * PACK; first < width; first += LANE_STEP) {
        Pack pack = load_pack(x, first, width, aligned);
        Pack z = load_pack(gate, first, width, aligned);
        Pack factor = load_pack(weight, first, width, aligned);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) pack.at[i] = pack.at[i] * r * factor.at[i] * (z.at[i] * logistic(z.at[i]));
        store_pack(y, first, width, aligned, pack);
    }
}

template <class A, class W>
DEVICE void gated_norm_backward(const A* x, const A* gate, const W* weight, const f32* rstd, const A* dy, A* dx, A* dgate,
                                i64 rows, i32 width) {
    i64 row;
    if (!find_row(rows, row)) return;
    bool aligned = width % PACK == 0;
    x += row * width, gate += row * width, dy += row * width, dx += row * width, dgate += row * width;
    f32 r = rstd[row];
    f32 sum = 0.0f;
    // h = dy · silu(z) · w
    auto through_gate = [&](const Pack& z, const Pack& factor, i32 first) {
        Pack h = load_pack(dy, first, width, aligned);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) h.at[i] *= z.at[i] * logistic(z.at[i]) * factor.at[i];
        return h;
    };
    for (i32 first = lane_index() * PACK; first < width; first += LANE_STEP) {
        Pack z = load_pack(gate, first, width, aligned), factor = load_pack(weight, first, width, aligned);
        sum += dot(through_gate(z, factor, first), load_pack(x, first, width, aligned));
    }
    f32 pull = r * r * (warp_sum(sum) / f32(width));
    for (i32 first = lane_index() * PACK; first < width; first += LANE_STEP) {
        Pack value = load_pack(x, first, width, aligned), gradient = load_pack(dy, first, width, aligned);
        Pack z = load_pack(gate, first, width, aligned), factor = load_pack(weight, first, width, aligned);
        Pack h = through_gate(z, factor, first);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
            f32 sigma = logistic(z.at[i]);
            gradient.at[i] *= value.at[i] * r * factor.at[i] * sigma * (1.0f + z.at[i] * (1.0f - sigma));
            h.at[i] = r * (h.at[i] - value.at[i] * pull);
        }
        store_pack(dx, first, width, aligned, h);
        store_pack(dgate, first, width, aligned, gradient);
    }
}

template <class A>
DEVICE void l2_norm_forward(const A* x, A* y, f32* rnorm, i64 rows, i32 width, f32 eps) {
    i64 row;
    if (!find_row(rows, row)) return;
    bool aligned = width % PACK == 0;
    x += row * width, y += row * width;
    f32 squares = 0.0f;
    for (i32 first = lane_index() * PACK; first < width; first += LANE_STEP) {
        Pack pack = load_pack(x, first, width, aligned);
        squares += dot(pack, pack);
    }
    f32 r = 1.0f / sqrtf(warp_sum(squares) + eps);
    if (lane_index() == 0) rnorm[row] = r;
    for (i32 first = lane_index() * PACK; first < width; first += LANE_STEP) {
        Pack pack = load_pack(x, first, width, aligned);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) pack.at[i] *= r;
        store_pack(y, first, width, aligned, pack);
    }
}

template <class A>
DEVICE void l2_norm_backward(const A* x, const f32* rnorm, const A* dy, A* dx, i64 rows, i32 width) {
    i64 row;
    if (!find_row(rows, row)) return;
    bool aligned = width % PACK == 0;
    x += row * width, dy += row * width, dx += row * width;
    f32 sum = 0.0f;
    for (i32 first = lane_index() * PACK; first < width; first += LANE_STEP)
        sum += dot(load_pack(x, first, width, aligned), load_pack(dy, first, width, aligned));
    f32 r = rnorm[row];
    f32 pull = r * r * warp_sum(sum);
    for (i32 first = lane_index() * PACK; first < width; first += LANE_STEP) {
        Pack value = load_pack(x, first, width, aligned), gradient = load_pack(dy, first, width, aligned);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) gradient.at[i] = r * (gradient.at[i] - value.at[i] * pull);
        store_pack(dx, first, width, aligned, gradient);
    }
}

// ---- gates of the delta rule ---------------------------------------------------------------------------------------

// ln(1 + e^x), without overflow.
DEVICE f32 softplus(f32 x) { return x > 0.0f ? x + log1pf(expf(-x)) : log1pf(expf(x)); }

template <class A>
DEVICE void delta_gates_forward(const A* a, const A* b, const f32* a_log, const f32* bias, f32* decay, f32* beta, i64 count,
                                i32 heads) {
    i64 i = global_thread();
    if (i >= count) return;
    i32 head = i32(i % heads);
    decay[i] = -expf(a_log[head]) * softplus(to_f32(a[i]) + bias[head]);
    beta[i] = logistic(to_f32(b[i]));
}

template <class A>
DEVICE void delta_gates_backward(const A* a, const f32* a_log, const f32* bias, const f32* beta, const f32* ddecay,
                                 const f32* dbeta, A* da, A* db, i64 count, i32 heads) {
    i64 i = global_thread();
    if (i >= count) return;
    i32 head = i32(i % heads);
    da[i] = from_f32<A>(ddecay[i] * -expf(a_log[head]) * logistic(to_f32(a[i]) + bias[head]));
    db[i] = from_f32<A>(dbeta[i] * beta[i] * (1.0f - beta[i]));
}

#define ACTIVATION(A)                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    sigmoid_gate_forward_##A(const A* __restrict__ x, const A* __restrict__ gate, A* __restrict__ y, i64 count, i32 width,   \
                             i32 per_row, i32 accumulate) {                                                                  \
        sigmoid_gate_forward<A>(x, gate, y, count, width, per_row, accumulate);                                              \
    }                                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    sigmoid_gate_backward_each_##A(const A* __restrict__ x, const A* __restrict__ gate, const A* __restrict__ dy,            \
                                   A* __restrict__ dx, A* __restrict__ dgate, i64 count) {                                   \
        sigmoid_gate_backward_each<A>(x, gate, dy, dx, dgate, count);                                                        \
    }                                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    sigmoid_gate_backward_row_##A(const A* __restrict__ x, const A* __restrict__ gate, const A* __restrict__ dy,             \
                                  A* __restrict__ dx, A* __restrict__ dgate, i64 rows, i32 width) {                          \
        sigmoid_gate_backward_row<A>(x, gate, dy, dx, dgate, rows, width);                                                   \
    }                                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    l2_norm_forward_##A(const A* __restrict__ x, A* __restrict__ y, f32* __restrict__ rnorm, i64 rows, i32 width, f32 eps) { \
        l2_norm_forward<A>(x, y, rnorm, rows, width, eps);                                                                   \
    }                                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    l2_norm_backward_##A(const A* __restrict__ x, const f32* __restrict__ rnorm, const A* __restrict__ dy,                   \
                         A* __restrict__ dx, i64 rows, i32 width) {                                                          \
        l2_norm_backward<A>(x, rnorm, dy, dx, rows, width);                                                                  \
    }
ACTIVATION(f32)
ACTIVATION(bf16)

#define DELTA_GATES(A)                                                                                                       \
    ENTRY(THREADS)                                                                                                           \
    delta_gates_forward_##A(const A* __restrict__ a, const A* __restrict__ b, const f32* __restrict__ a_log,                 \
                            const f32* __restrict__ bias, f32* __restrict__ decay, f32* __restrict__ beta, i64 count,        \
                            i32 heads) {                                                                                     \
        delta_gates_forward<A>(a, b, a_log, bias, decay, beta, count, heads);                                                \
    }                                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    delta_gates_backward_##A(const A* __restrict__ a, const f32* __restrict__ a_log, const f32* __restrict__ bias,           \
                             const f32* __restrict__ beta, const f32* __restrict__ ddecay, const f32* __restrict__ dbeta,    \
                             A* __restrict__ da, A* __restrict__ db, i64 count, i32 heads) {                                 \
        delta_gates_backward<A>(a, a_log, bias, beta, ddecay, dbeta, da, db, count, heads);                                  \
    }
DELTA_GATES(f32)
DELTA_GATES(bf16)

#define WEIGHTED(A, W)                                                                                                       \
    ENTRY(THREADS)                                                                                                           \
    gated_norm_forward_##A##_##W(const A* __restrict__ x, const A* __restrict__ gate, const W* __restrict__ weight,          \
                                 A* __restrict__ y, f32* __restrict__ rstd, i64 rows, i32 width, f32 eps) {                  \
        gated_norm_forward<A, W>(x, gate, weight, y, rstd, rows, width, eps);                                                \
    }                                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    gated_norm_backward_##A##_##W(const A* __restrict__ x, const A* __restrict__ gate, const W* __restrict__ weight,         \
                                  const f32* __restrict__ rstd, const A* __restrict__ dy, A* __restrict__ dx,                \
                                  A* __restrict__ dgate, i64 rows, i32 width) {                                              \
        gated_norm_backward<A, W>(x, gate, weight, rstd, dy, dx, dgate, rows, width);                                        \
    }
WEIGHTED(f32, f32)
WEIGHTED(f32, bf16)
WEIGHTED(bf16, f32)
WEIGHTED(bf16, bf16)
