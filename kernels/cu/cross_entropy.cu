// The frozen head and cross-entropy in one op (Wijmans et al. 2024, arXiv 2411.09009), a chunk of rows at a time.
//
//   z_t    = x_t · Wᵀ                        [V]
//   loss_t = log Σ_v exp(z_tv) − z_t,label   0 where label = −100
//   dz_t   = g · (softmax(z_t) − onehot(label))
//   dx_t   = dz_t · W                        0 where label = −100
//
// Tensors: x, dx [T, C]; W [V, C] bf16, or NF4 codes with their scales; labels i32 [T]; losses f32 [T]. rows i32 [T] and count i32 [1]:
// the supervised positions in rising order, and how many there are. Working memory of a chunk of R rows, P = V rounded up to runs of 64:
// hidden bf16 [R, C]; of_rows i32 [R], their labels; powers bf16 [R, P]; runs f32 [R, P / 64, 2]; label_logits f32 [R]; factors f32
// [R, 2]; parts f32 [S, R, C].
//
// With e_v = exp(z_v), r = Σ_{v ≠ label} e_v and S = r + e_label:
//
//   loss = log (1 + r / e_label)
//   dx   = g/S · Σ_{v ≠ label} e_v W_v  −  g r/S · W_label
//
// so the second product needs no softmax: the first leaves e_v as they are, in bf16, with 0 at the label, and what depends on S and on
// the label is brought in by row when the parts are added. Logits are never stored, and no pass over R × P stands between the products.
//
// In six kernels:
//   supervised_rows   lists the positions that are learnt, checks every label
//   gather            the rows of a chunk of those, and their labels
//   logits            e_v of the chunk, and of every run of 64 columns the sum
//   sums              r, the losses, g/S and −g r/S
//   gradient          Σ e_v W_v in S parts of the vocabulary, because R × C alone has too few tiles to fill a device
//   collect           the parts in order, and the label's row, to the rows of dx
// The number of supervised rows stays on the device: the host launches chunks for all T rows, and blocks of rows that do not
// exist end at once. Where only losses are wanted, powers are not stored. On sm_90a the products are those of cross_entropy_hopper.cu,
// where they can be. The reference precision takes the products of matmul_f32.cu instead, and between them `softmax`; then `scatter`.
//
// Work: 4 V C multiply-adds for each supervised row, half of it without dx. Bytes of a chunk: W twice, powers written and read (4 R P),
// parts (8 S R C). Limited by tensor cores from some hundred rows a chunk on. An exponential costs a row's tile as much as some eight of
// the C deep multiplications.
//
// Numerics: logits, sums and parts in f32; e_v is rounded to bf16 as a factor, as softmax would be. e_v is divided by a power of two
// where a run's logits are beyond ±44, and brought to the row's largest such power by `sums`, so no logit overflows; both cost what the
// device's power of two is wrong by, at most 2 units in the last place of f32. The label's own share is f32 throughout, and nothing near
// 1 is ever taken from 1. A row's bits depend on the row, V and C.

#include "cross_entropy.cuh"
#include "tile.cuh"

constexpr i32 THREADS = 512;  // of softmax
constexpr i32 SCAN = 1024;    // of supervised_rows
constexpr i32 EACH = 256;     // of the others
constexpr i32 UNSUPERVISED = -100;

// One tile for both products; gpu/loss.rs has the same numbers.
using Large = Tile<128, 128, 2, 2, 3>;

// One block. `position` of a row is the number of supervised ones before it: a sum over lanes, over warps, and over rounds.
ENTRY(SCAN)
supervised_rows(const i32* __restrict__ labels, i32* __restrict__ rows, i32* __restrict__ count, i64 tokens, i32 vocabulary,
                i32* __restrict__ faults, i32 fault) {
    constexpr i32 WARPS = SCAN / WARP_LANES;
    SHARED(i32, of_warp, WARPS);
    i32 done = 0;
    for (i64 begin = 0; begin < tokens; begin += SCAN) {
        i64 t = begin + i32(threadIdx.x);
        i32 label = t < tokens ? labels[t] : UNSUPERVISED;
        bool supervised = label >= 0 && label < vocabulary;
        if (label != UNSUPERVISED && !supervised) report_fault(faults, fault, label);
        u32 votes = lanes_saying(supervised);
        if (lane_index() == 0) of_warp[warp_index()] = __popc(votes);
        __syncthreads();
        i32 position = done + __popc(votes & ((1u << lane_index()) - 1));
        for (i32 warp = 0; warp < WARPS; warp++) {
            if (warp < warp_index()) position += of_warp[warp];
            done += of_warp[warp];
        }
        if (supervised) rows[position] = i32(t);
        __syncthreads();  // everybody has read the counts
    }
    if (threadIdx.x == 0) *count = done;
}

// hidden [chunk, C] = rows of x by the list, of_rows [chunk] their labels; a thread an element.
template <class A, class H>
DEVICE void gather(const A* x, const i32* labels, const i32* rows, const i32* count, H* hidden, i32* of_rows, i64 first, i32 chunk,
                   i32 width) {
    i64 i = global_thread();
    if (i >= rows_of_chunk(count, first, chunk) * width) return;
    i64 t = rows[first + i / width];
    hidden[i] = from_f32<H>(to_f32(x[t * width + i % width]));
    if (i % width == 0) of_rows[i / width] = labels[t];
}

template <class W>
DEVICE void logits(const bf16* hidden, const W* head, Nf4Scales scales, const i32* count, Exponentials out, i64 first, i32 chunk,
                   i32 width) {
    DYNAMIC_SHARED(memory);
    i64 m = i64(blockIdx.x) * Large::M, n = i64(blockIdx.y) * Large::N, here = rows_of_chunk(count, first, chunk);
    if (m >= here) return;
    Rows left{hidden, here, width};
    auto right = right_factor(head, scales, out.vocabulary, width);
    Sums<Large> sums;
    multiply_tile<Large, false, false>(sums, reinterpret_cast<bf16*>(memory), m, n, left, right, width);
    for_each_pack<Large>(sums, memory,
                         [&](i32 row, i32 column, Pack& pack) { out.store(m + row, i32(n) + column, m + row < here, pack); });
}

// A block a row: the largest reference of its runs, their sums by that, and the powers of runs that have another.
ENTRY(EACH)
cross_entropy_sums(const f32* __restrict__ runs, const i32* __restrict__ rows, const i32* __restrict__ count,
                   const f32* __restrict__ label_logits, bf16* __restrict__ powers, f32* __restrict__ losses,
                   f32* __restrict__ factors, i64 first, i32 chunk, i64 pitch, const f32* __restrict__ scale) {
    i64 row = blockIdx.x;
    if (row >= rows_of_chunk(count, first, chunk)) return;
    i32 count_of_runs = i32(pitch / RUN);
    const f32* run = runs + row * count_of_runs * 2;
    f32 largest = -infinity();
    for (i32 i = i32(threadIdx.x); i < count_of_runs; i += EACH) largest = run[2 * i + 1] > largest ? run[2 * i + 1] : largest;
    largest = block_max<EACH>(largest);
    f32 sum = 0.0f;
    for (i32 i = i32(threadIdx.x); i < count_of_runs; i += EACH) {
        f32 smaller = power_of_two(run[2 * i + 1] - largest);
        sum += run[2 * i] * smaller;
        if (powers == nullptr || smaller == 1.0f) continue;
        bf16* power = powers + row * pitch + i64(i) * RUN;
        for (i32 k = 0; k < RUN; k++) power[k] = from_f32<bf16>(to_f32(power[k]) * smaller);
    }
    sum = block_sum<EACH>(sum);
    if (threadIdx.x > 0) return;
    f32 label = label_logits[row], own = exponential(label, largest), all = sum + own;
    losses[rows[first + row]] = sum < own ? log1pf(sum / own) : logf(all) + (largest * 0.693147180559945f - label);
    if (factors == nullptr) return;
    factors[2 * row] = *scale / all;
    factors[2 * row + 1] = -*scale * (sum / all);
}

// In the reference precision, a block a row: a maximum and a sum that follows it, over this thread's columns and then over the threads; then dz.
DEVICE void softmax(const f32* logits, const i32* labels, const i32* rows, const i32* count, f32* losses, f32* gradient, i64 first,
                    i32 chunk, i32 vocabulary, i64 pitch, const f32* scale) {
    i64 row = blockIdx.x;
    if (row >= rows_of_chunk(count, first, chunk)) return;
    const f32* z = logits + row * pitch;
    i32 t = rows[first + row], label = labels[t];
    bool aligned = pitch % PACK == 0;
    f32 largest = -infinity(), sum = 0.0f;
    for (i64 column = i64(threadIdx.x) * PACK; column < vocabulary; column += THREADS * PACK) {
        Pack pack = load_pack(z, column, vocabulary, aligned);
        i32 exist = i32(vocabulary - column < PACK ? vocabulary - column : PACK);
        f32 highest = largest;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) highest = i < exist && pack.at[i] > highest ? pack.at[i] : highest;
        if (highest > largest) sum *= expf(largest - highest);
        largest = highest;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) sum += i < exist ? expf(pack.at[i] - largest) : 0.0f;
    }
    f32 highest = block_max<THREADS>(largest);
    sum = block_sum<THREADS>(sum == 0.0f ? 0.0f : sum * expf(largest - highest));
    if (threadIdx.x == 0) losses[t] = highest + logf(sum) - z[label];
    if (gradient == nullptr) return;
    f32 factor = *scale, share = factor / sum;
    for (i64 column = i64(threadIdx.x) * PACK; column < pitch; column += THREADS * PACK) {
        Pack pack = load_pack(z, column, vocabulary, aligned);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
            f32 slope = share * expf(pack.at[i] - highest) - (column + i == label ? factor : 0.0f);
            pack.at[i] = column + i < vocabulary ? slope : 0.0f;
        }
        store_pack(gradient + row * pitch, column, pitch, aligned, pack);
    }
}

// Part blockIdx.z of the vocabulary: `part` entries, a multiple of 64, of which the last part may have fewer.
template <class W>
DEVICE void gradient(const bf16* powers, const W* head, Nf4Scales scales, const i32* count, f32* parts, i64 first, i32 chunk,
                     i32 width, i32 vocabulary, i64 pitch, i32 part) {
    DYNAMIC_SHARED(memory);
    i64 m = i64(blockIdx.x) * Large::M, n = i64(blockIdx.y) * Large::N, here = rows_of_chunk(count, first, chunk);
    if (m >= here) return;
    i64 begin = i64(blockIdx.z) * part;
    i32 deep = i32(vocabulary - begin < part ? vocabulary - begin : part);
    Rows left{powers + begin, here, pitch};  // whose columns from `deep` on are not read
    auto right = below(right_factor(head, scales, vocabulary, width), begin);
    Sums<Large> sums;
    multiply_tile<Large, false, true>(sums, reinterpret_cast<bf16*>(memory), m, n, left, right, deep);
    f32* out = parts + i64(blockIdx.z) * chunk * width;
    for_each_pack<Large>(sums, memory, [&](i32 row, i32 column, const Pack& pack) {
        if (m + row < here) store_pack(out + (m + row) * width, n + column, width, width % PACK == 0, pack);
    });
}

// dx[row of the list] = Σ parts; a thread an element.
template <class A>
DEVICE void scatter(const f32* parts, const i32* rows, const i32* count, A* dx, i64 first, i32 chunk, i32 width, i32 parts_count) {
    i64 i = global_thread(), size = i64(chunk) * width;
    if (i >= rows_of_chunk(count, first, chunk) * width) return;
    f32 sum = 0.0f;
    for (i32 part = 0; part < parts_count; part++) sum += parts[part * size + i];
    dx[rows[first + i / width] * i64(width) + i % width] = from_f32<A>(sum);
}

// An element of the head.
DEVICE f32 element(const bf16* head, const Nf4Scales&, i64 i) { return to_f32(head[i]); }
DEVICE f32 element(const u8* codes, const Nf4Scales& scales, i64 i) {
    i32 code = i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
    return rounded<bf16>(__fmul_rn(NF4_VALUES[code], scales.of(i / NF4_BLOCK)));
}

// dx[row of the list] = g/S Σ parts − g r/S W_label; a thread an element.
template <class A, class W>
DEVICE void collect(const f32* parts, const f32* factors, const i32* labels, const W* head, Nf4Scales scales, const i32* rows,
                    const i32* count, A* dx, i64 first, i32 chunk, i32 width, i32 parts_count) {
    i64 i = global_thread(), size = i64(chunk) * width;
    if (i >= rows_of_chunk(count, first, chunk) * width) return;
    i64 row = i / width, column = i % width;
    f32 sum = 0.0f;
    for (i32 part = 0; part < parts_count; part++) sum += parts[part * size + i];
    f32 own = element(head, scales, labels[row] * i64(width) + column);
    dx[rows[first + row] * i64(width) + column] = from_f32<A>(factors[2 * row] * sum + factors[2 * row + 1] * own);
}

#define PRODUCTS(W)                                                                                                         \
    ENTRY(Large::THREADS, Large::BLOCKS)                                                                                    \
    cross_entropy_logits_##W(const bf16* __restrict__ hidden, const W* __restrict__ head, const f32* __restrict__ absmax,   \
                             const u8* __restrict__ nested_codes, const f32* __restrict__ nested_map, f32 offset,           \
                             const i32* __restrict__ count, const i32* __restrict__ labels, bf16* __restrict__ powers,      \
                             f32* __restrict__ runs, f32* __restrict__ label_logits, i64 first, i32 chunk, i32 width,       \
                             i32 vocabulary, i64 pitch) {                                                                   \
        logits<W>(hidden, head, Nf4Scales{absmax, nested_codes, nested_map, offset}, count,                                 \
                  Exponentials{labels, powers, runs, label_logits, vocabulary, pitch}, first, chunk, width);                \
    }                                                                                                                       \
    ENTRY(Large::THREADS, Large::BLOCKS)                                                                                    \
    cross_entropy_gradient_##W(const bf16* __restrict__ powers, const W* __restrict__ head, const f32* __restrict__ absmax, \
                               const u8* __restrict__ nested_codes, const f32* __restrict__ nested_map, f32 offset,         \
                               const i32* __restrict__ count, f32* __restrict__ parts, i64 first, i32 chunk, i32 width,     \
                               i32 vocabulary, i64 pitch, i32 part) {                                                       \
        gradient<W>(powers, head, Nf4Scales{absmax, nested_codes, nested_map, offset}, count, parts, first, chunk, width,   \
                    vocabulary, pitch, part);                                                                               \
    }
PRODUCTS(bf16)
PRODUCTS(u8)

ENTRY(THREADS)
cross_entropy_softmax(const f32* __restrict__ logits, const i32* __restrict__ labels, const i32* __restrict__ rows,
                      const i32* __restrict__ count, f32* __restrict__ losses, f32* __restrict__ gradient, i64 first, i32 chunk,
                      i32 vocabulary, i64 pitch, const f32* __restrict__ scale) {
    softmax(logits, labels, rows, count, losses, gradient, first, chunk, vocabulary, pitch, scale);
}

#define SCATTER(A)                                                                                                          \
    ENTRY(EACH)                                                                                                             \
    cross_entropy_scatter_##A(const f32* __restrict__ parts, const i32* __restrict__ rows, const i32* __restrict__ count,   \
                              A* __restrict__ dx, i64 first, i32 chunk, i32 width, i32 parts_count) {                       \
        scatter<A>(parts, rows, count, dx, first, chunk, width, parts_count);                                               \
    }
SCATTER(f32)
SCATTER(bf16)

#define COLLECT(A, W)                                                                                                       \
    ENTRY(EACH)                                                                                                             \
    cross_entropy_collect_##A##_##W(const f32* __restrict__ parts, const f32* __restrict__ factors,                         \
                                    const i32* __restrict__ labels, const W* __restrict__ head,                             \
                                    const f32* __restrict__ absmax, const u8* __restrict__ nested_codes,                    \
                                    const f32* __restrict__ nested_map, f32 offset, const i32* __restrict__ rows,           \
                                    const i32* __restrict__ count, A* __restrict__ dx, i64 first, i32 chunk, i32 width,     \
                                    i32 parts_count) {                                                                      \
        collect<A, W>(parts, factors, labels, head, Nf4Scales{absmax, nested_codes, nested_map, offset}, rows, count, dx,   \
                      first, chunk, width, parts_count);                                                                    \
    }
COLLECT(f32, bf16)
COLLECT(f32, u8)
COLLECT(bf16, bf16)
COLLECT(bf16, u8)

#define GATHER(A, H)                                                                                                        \
    ENTRY(EACH)                                                                                                             \
    cross_entropy_gather_##A##_##H(const A* __restrict__ x, const i32* __restrict__ labels, const i32* __restrict__ rows,   \
                                   const i32* __restrict__ count, H* __restrict__ hidden, i32* __restrict__ of_rows,        \
                                   i64 first, i32 chunk, i32 width) {                                                       \
        gather<A, H>(x, labels, rows, count, hidden, of_rows, first, chunk, width);                                         \
    }
GATHER(f32, f32)
GATHER(f32, bf16)
GATHER(bf16, f32)
GATHER(bf16, bf16)
