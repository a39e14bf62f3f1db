// Products of activations with frozen matrices in bf16 on tensor cores, LoRA included (Hu et al. 2021, arXiv 2106.09685).
//
//   product_rows      out [M, N] = left [M, K] · W [N, K]ᵀ + left2 [M, R] · right2 [N, R]ᵀ + bias      y  = x Wᵀ + s u Bᵀ + bias
//   product_columns   out [M, N] = left [M, K] · W [K, N]  + left2 [M, R] · right2 [R, N]              dx = dy W + v A
//   product_outer     parts [S, M, N] = left [K, M]ᵀ · right [K, N], K cut into S parts                dA = vᵀ x,  dBᵀ = uᵀ dy
//   add_parts         gradient += scale · Σ parts, in order of the parts, straight or transposed
//   sum_parts         out [M, N] = Σ parts [S, M, N], in order of the parts, + bias
//
// Where a product has too few tiles for a device, product_rows and product_columns write parts [S, M, N] instead, without bias: K cut
// into S parts, the last of which has the low-rank term. How many is decided by the shape alone (gpu/matmul/choice.rs), so bits are too.
//
// Tensors: left, left2, right2, right: bf16. W: bf16, or NF4 codes with their scales (see nf4.cuh): the same codes are read
// straight for y and transposed for dx, and decoded on their way to shared memory, so no decoded matrix exists. out: f32 or
// bf16, replaced or added to; `copy` gets bf16(copy_scale · out). Either may be left out.
//
// Bytes, for activations of 2 bytes: 2 M K + W + 2 M N; W is 2 N K, or 0.5 N K and its scales. W is read once from device
// memory and M / 128 times from the second level of cache: blocks that share columns of W are neighbours in the grid.
//
// Decomposition: see tile.cuh. Two tiles, chosen by the host from a table: `large` 128 × 128, four warps of 64 × 64, three stages
// (96 KB of shared memory, which every target has; sm_90 has room for two blocks), and `small` 32 × 64, four warps, four stages,
// for few tokens and for products as narrow as an adapter's rank. Eight warps of 64 × 32 would load each fragment of the left
// factor twice as often, and decoding then makes shared memory the limit: 1280 cycles a step against 1024 of tensor cores.
// u = x Aᵀ is a launch of its own: as a part of every tile of y it would cost R / 128 of y's arithmetic; as a launch it reads x
// once more.
//
// Numerics: products of bf16 factors summed in f32; the low-rank term is summed after the layer's own in the same registers;
// bias and what is added to come last. s · u and s · dy B are rounded to bf16 before they enter their second product. The
// parts of an outer product, a fixed number of tokens each, are added in order, so gradients have the same bits every time.

#include "tile.cuh"

// Launched by these names; gpu/matmul.rs has the same numbers.
using Large = Tile<128, 128, 2, 2, 3>;
using Small = Tile<32, 64, 1, 4, 4>;

// What is done with a finished tile.
template <class OUT>
struct Epilogue {
    const f32* bias_f32;    // either may be given
    const bf16* bias_bf16;
    OUT* out;
    bf16* copy;
    f32 copy_scale;
    i64 rows;
    i64 columns;
    i32 accumulate;

    DEVICE void operator()(i64 row, i64 column, Pack pack) const {
        if (row >= rows || column >= columns) return;
        bool aligned = columns % PACK == 0;
        i64 at = row * columns;
        if (bias_f32 != nullptr) add(pack, load_pack(bias_f32, column, columns, true));
        if (bias_bf16 != nullptr) add(pack, load_pack(bias_bf16, column, columns, true));
        if (accumulate) add(pack, load_pack(out + at, column, columns, aligned));
        if (out != nullptr) store_pack(out + at, column, columns, aligned, pack);
        if (copy == nullptr) return;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) pack.at[i] *= copy_scale;
        store_pack(copy + at, column, columns, aligned, pack);
    }

    static DEVICE void add(Pack& to, const Pack& from) {
#pragma unroll
        for (i32 i = 0; i < PACK; i++) to.at[i] += from.at[i];
    }
};

template <class T, bool COLUMNS, class W, class OUT>
DEVICE void product(const bf16* left, const W* weight, Nf4Scales scales, const bf16* left2, const bf16* right2,
                    Epilogue<OUT> epilogue, i32 depth, i32 depth2, i32 part) {
    DYNAMIC_SHARED(memory);
    i64 m = i64(blockIdx.x) * T::M, n = i64(blockIdx.y) * T::N;
    i64 rows = epilogue.rows, columns = epilogue.columns;
    auto right = right_factor(weight, scales, COLUMNS ? depth : columns, COLUMNS ? columns : depth);
    // Of several parts, the one that this block has.
    i32 begin = i32(blockIdx.z) * part, deep = min(part, depth - begin);
    if (begin + deep < depth) depth2 = 0;
    if (blockIdx.z > 0) epilogue.out += i64(blockIdx.z) * rows * columns;
    right = COLUMNS ? below(right, begin) : beyond(right, begin);
    Term<Rows, decltype(right)> terms[1] = {{Rows{left + begin, rows, depth}, right, deep}};
    Term<Rows, DenseRight> low_rank{
        Rows{left2, rows, depth2}, DenseRight{{right2, COLUMNS ? depth2 : columns, COLUMNS ? columns : depth2}}, depth2};
    Sums<T> sums;
    multiply_tile<T, false, COLUMNS>(sums, reinterpret_cast<bf16*>(memory), m, n, terms, low_rank);
    for_each_pack<T>(sums, memory, [&](i32 row, i32 column, const Pack& pack) { epilogue(m + row, n + column, pack); });
}

// Part blockIdx.z of the depth, which is `part` deep.
template <class T>
DEVICE void outer(const bf16* left, const bf16* right, f32* parts, i64 depth, i32 part, i32 rows, i32 columns) {
    DYNAMIC_SHARED(memory);
    i64 m = i64(blockIdx.x) * T::M, n = i64(blockIdx.y) * T::N, begin = i64(blockIdx.z) * part;
    i32 deep = i32(depth - begin < part ? depth - begin : part);
    Rows left_rows{left + begin * rows, deep, rows};
    DenseRight right_rows{{right + begin * columns, deep, columns}};
    Sums<T> sums;
    multiply_tile<T, true, true>(sums, reinterpret_cast<bf16*>(memory), m, n, left_rows, right_rows, deep);
    Epilogue<f32> epilogue{nullptr, nullptr, parts + i64(blockIdx.z) * rows * columns, nullptr, 0.0f, rows, columns, 0};
    for_each_pack<T>(sums, memory, [&](i32 row, i32 column, const Pack& pack) { epilogue(m + row, n + column, pack); });
}

#define PRODUCT(name, T, tile, COLUMNS, W, OUT)                                                                              \
    ENTRY(T::THREADS, T::BLOCKS)                                                                                                 \
    product_##name##_##tile##_##W##_##OUT(                                                                                   \
        const bf16* __restrict__ left, const W* __restrict__ weight, const f32* __restrict__ absmax,                         \
        const u8* __restrict__ nested_codes, const f32* __restrict__ nested_map, f32 offset, const bf16* __restrict__ left2, \
        const bf16* __restrict__ right2, const f32* __restrict__ bias_f32, const bf16* __restrict__ bias_bf16,               \
        OUT* __restrict__ out, bf16* __restrict__ copy, f32 copy_scale, i64 rows, i32 columns, i32 depth, i32 depth2,        \
        i32 part, i32 accumulate) {                                                                                          \
        Epilogue<OUT> epilogue{bias_f32, bias_bf16, out, copy, copy_scale, rows, columns, accumulate};                       \
        product<T, COLUMNS>(left, weight, Nf4Scales{absmax, nested_codes, nested_map, offset}, left2, right2, epilogue,      \
                            depth, depth2, part);                                                                            \
    }
PRODUCT(rows, Large, large, false, bf16, f32)
PRODUCT(rows, Large, large, false, bf16, bf16)
PRODUCT(rows, Large, large, false, u8, f32)
PRODUCT(rows, Large, large, false, u8, bf16)
PRODUCT(rows, Small, small, false, bf16, f32)
PRODUCT(rows, Small, small, false, bf16, bf16)
PRODUCT(rows, Small, small, false, u8, f32)
PRODUCT(rows, Small, small, false, u8, bf16)
PRODUCT(columns, Large, large, true, bf16, f32)
PRODUCT(columns, Large, large, true, bf16, bf16)
PRODUCT(columns, Large, large, true, u8, f32)
PRODUCT(columns, Large, large, true, u8, bf16)
PRODUCT(columns, Small, small, true, bf16, f32)
PRODUCT(columns, Small, small, true, bf16, bf16)
PRODUCT(columns, Small, small, true, u8, f32)
PRODUCT(columns, Small, small, true, u8, bf16)

ENTRY(Small::THREADS, Small::BLOCKS)
product_outer(const bf16* __restrict__ left, const bf16* __restrict__ right, f32* __restrict__ parts, i64 depth, i32 part,
              i32 rows, i32 columns) {
    outer<Small>(left, right, parts, depth, part, rows, columns);
}

// gradient [rows, columns] += scale · Σ parts [count, rows, columns]; or the transposed sum, to gradient [columns, rows].
ENTRY(256)
add_parts(const f32* __restrict__ parts, f32* __restrict__ gradient, i32 count, i32 rows, i32 columns, f32 scale,
          i32 transposed) {
    i64 i = global_thread(), size = i64(rows) * columns;
    if (i >= size) return;
    f32 sum = 0.0f;
    for (i32 part = 0; part < count; part++) sum += parts[part * size + i];
    gradient[transposed ? i % columns * rows + i / columns : i] += scale * sum;
}

// out [rows, columns] and `copy` as those of products; a thread a pack.
template <class OUT>
DEVICE void sum_parts(const f32* parts, i32 count, const Epilogue<OUT>& epilogue) {
    i64 columns = epilogue.columns, packs = (columns + PACK - 1) / PACK, i = global_thread();
    i64 row = i / packs, column = i % packs * PACK;
    if (row >= epilogue.rows) return;
    Pack sum{};
    for (i32 part = 0; part < count; part++)
        Epilogue<OUT>::add(sum, load_pack(parts + (part * epilogue.rows + row) * columns, column, columns, columns % PACK == 0));
    epilogue(row, column, sum);
}

#define SUM_PARTS(OUT)                                                                                                       \
    ENTRY(256)                                                                                                               \
    sum_parts_##OUT(const f32* __restrict__ parts, const f32* __restrict__ bias_f32, const bf16* __restrict__ bias_bf16,     \
                    OUT* __restrict__ out, bf16* __restrict__ copy, f32 copy_scale, i64 rows, i32 columns, i32 count,        \
                    i32 accumulate) {                                                                                        \
        sum_parts<OUT>(parts, count, {bias_f32, bias_bf16, out, copy, copy_scale, rows, columns, accumulate});               \
    }
SUM_PARTS(f32)
SUM_PARTS(bf16)
