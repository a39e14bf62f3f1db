// The frozen head and cross-entropy in one op (Wijmans et al. 2024, arXiv 2411.09009), a chunk of rows at a time.
//
//   z_t    = x_t · Wᵀ                        [V]
//   loss_t = log Σ_v exp(z_tv) − z_t,label   0 where label = −100
//   dz_t   = g · (softmax(z_t) − onehot(label))
//   dx_t   = dz_t · W                        0 where label = −100
//
// Tensors: x, dx [T, C]; W [V, C] bf16, or NF4 codes with their scales; labels i32 [T]; losses f32 [T]. Working memory of a
// chunk of R rows, P = V rounded up: hidden [R, C]; logits f32 [R, P]; dz [R, P]; parts f32 [S, R, C]. rows i32 [T] and count i32 [1]: the
// supervised positions in rising order, and how many there are.
//
// In six kernels:
//   supervised_rows   lists the positions that are learnt, checks every label
//   gather            the rows of a chunk of those, as the products want them
//   logits            z of the chunk
//   softmax           losses, and dz, of which the columns from V to P are zeros
//   gradient          dz · W in S parts of the vocabulary, because R × C alone has too few tiles to fill a device
//   scatter           the sum of the parts, in order, to the rows of dx
// The number of supervised rows stays on the device: the host launches chunks for all T rows, and blocks of rows that do not
// exist end at once. The reference precision takes the products of matmul_f32.cu instead; on sm_90a those of cross_entropy_hopper.cu
// do both products, where they can.
//
// Work: 4 V C multiply-adds for each supervised row, half of it without dx. Bytes of a chunk: W twice, 10 R P of logits and dz.
// Limited by tensor cores from some hundred rows a chunk on.
//
// Numerics: logits, softmax and parts in f32; dz is rounded to bf16 as a factor. A row's bits depend on the row, V and C.

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

// hidden [chunk, C] = rows of x by the list; a thread an element.
template <class A, class H>
DEVICE void gather(const A* x, const i32* rows, const i32* count, H* hidden, i64 first, i32 chunk, i32 width) {
    i64 i = global_thread();
    if (i >= rows_of_chunk(count, first, chunk) * width) return;
    hidden[i] = from_f32<H>(to_f32(x[rows[first + i / width] * i64(width) + i % width]));
}

template <class W>
DEVICE void logits(const bf16* hidden, const W* head, Nf4Scales scales, const i32* count, f32* out, i64 first, i32 chunk,
                   i32 width, i32 vocabulary, i64 pitch) {
    DYNAMIC_SHARED(memory);
    i64 m = i64(blockIdx.x) * Large::M, n = i64(blockIdx.y) * Large::N, here = rows_of_chunk(count, first, chunk);
    if (m >= here) return;
    Rows left{hidden, here, width};
    auto right = right_factor(head, scales, vocabulary, width);
    Sums<Large> sums;
    multiply_tile<Large, false, false>(sums, reinterpret_cast<bf16*>(memory), m, n, left, right, width);
    for_each_pack<Large>(sums, memory, [&](i32 row, i32 column, const Pack& pack) {
        if (m + row < here) store_pack(out + (m + row) * pitch, n + column, vocabulary, true, pack);
    });
}

// A block a row: a maximum and a sum that follows it, over this thread's columns and then over the threads; then dz.
template <class G>
DEVICE void softmax(const f32* logits, const i32* labels, const i32* rows, const i32* count, f32* losses, G* gradient, i64 first,
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
DEVICE void gradient(const bf16* dz, const W* head, Nf4Scales scales, const i32* count, f32* parts, i64 first, i32 chunk,
                     i32 width, i32 vocabulary, i64 pitch, i32 part) {
    DYNAMIC_SHARED(memory);
    i64 m = i64(blockIdx.x) * Large::M, n = i64(blockIdx.y) * Large::N, here = rows_of_chunk(count, first, chunk);
    if (m >= here) return;
    i64 begin = i64(blockIdx.z) * part;
    i32 deep = i32(vocabulary - begin < part ? vocabulary - begin : part);
    Rows left{dz + begin, here, pitch};  // whose columns from `deep` on are not read
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

#define PRODUCTS(W)                                                                                                         \
    ENTRY(Large::THREADS, Large::BLOCKS)                                                                                    \
    cross_entropy_logits_##W(const bf16* __restrict__ hidden, const W* __restrict__ head, const f32* __restrict__ absmax,   \
                             const u8* __restrict__ nested_codes, const f32* __restrict__ nested_map, f32 offset,           \
                             const i32* __restrict__ count, f32* __restrict__ out, i64 first, i32 chunk, i32 width,         \
                             i32 vocabulary, i64 pitch) {                                                                   \
        logits<W>(hidden, head, Nf4Scales{absmax, nested_codes, nested_map, offset}, count, out, first, chunk, width,       \
                  vocabulary, pitch);                                                                                       \
    }                                                                                                                       \
    ENTRY(Large::THREADS, Large::BLOCKS)                                                                                    \
    cross_entropy_gradient_##W(const bf16* __restrict__ dz, const W* __restrict__ head, const f32* __restrict__ absmax,     \
                               const u8* __restrict__ nested_codes, const f32* __restrict__ nested_map, f32 offset,         \
                               const i32* __restrict__ count, f32* __restrict__ parts, i64 first, i32 chunk, i32 width,     \
                               i32 vocabulary, i64 pitch, i32 part) {                                                       \
        gradient<W>(dz, head, Nf4Scales{absmax, nested_codes, nested_map, offset}, count, parts, first, chunk, width,       \
                    vocabulary, pitch, part);                                                                               \
    }
PRODUCTS(bf16)
PRODUCTS(u8)

#define ROWS(A)                                                                                                             \
    ENTRY(THREADS)                                                                                                          \
    cross_entropy_softmax_##A(const f32* __restrict__ logits, const i32* __restrict__ labels,                               \
                              const i32* __restrict__ rows, const i32* __restrict__ count, f32* __restrict__ losses,        \
                              A* __restrict__ gradient, i64 first, i32 chunk, i32 vocabulary, i64 pitch,                    \
                              const f32* __restrict__ scale) {                                                              \
        softmax<A>(logits, labels, rows, count, losses, gradient, first, chunk, vocabulary, pitch, scale);                  \
    }                                                                                                                       \
    ENTRY(EACH)                                                                                                             \
    cross_entropy_scatter_##A(const f32* __restrict__ parts, const i32* __restrict__ rows, const i32* __restrict__ count,   \
                              A* __restrict__ dx, i64 first, i32 chunk, i32 width, i32 parts_count) {                       \
        scatter<A>(parts, rows, count, dx, first, chunk, width, parts_count);                                               \
    }
ROWS(f32)
ROWS(bf16)

#define GATHER(A, H)                                                                                                        \
    ENTRY(EACH)                                                                                                             \
    cross_entropy_gather_##A##_##H(const A* __restrict__ x, const i32* __restrict__ rows, const i32* __restrict__ count,    \
                                   H* __restrict__ hidden, i64 first, i32 chunk, i32 width) {                               \
        gather<A, H>(x, rows, count, hidden, first, chunk, width);                                                          \
    }
GATHER(f32, f32)
GATHER(f32, bf16)
GATHER(bf16, f32)
GATHER(bf16, bf16)
