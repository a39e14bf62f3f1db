// Layers of routed experts in f32: the reference precision of grouped.cu, whose formulas and tensors these are, with f32 factors.
//
// Every matrix has a stride for its index and one for its depth, so one kernel reads W for y = x W_eᵀ and transposed for
// dx = dy W_e, and one the gradients of both halves of an adapter.
//
// Bytes: as grouped.cu with 4 bytes an activation. Limited by arithmetic: there are no tensor cores for f32.
//
// Decomposition: 64 × 64 elements a block (product.cuh), of the rows of one expert. The outer products: a block has 64 × 64 elements
// of one expert's gradient and goes through that expert's rows in their order.
//
// Numerics: frozen weights are widened exactly; each sum is one chain in the order of the depth, the second term's after the first's.

#include "product.cuh"
#include "factor.cuh"
#include "grouped.cuh"

constexpr i32 THREADS = 256;
static_assert(THREADS == PRODUCT_THREADS, "a block's threads are those of its products");
constexpr i32 TILE = PRODUCT_ROWS;

// tile += rows · factor, for `columns` from `n` on.
template <class W>
DEVICE void add_product(Product<f32, TILE>& tile, f32* stage, const GroupRows<f32>& rows, const Factor<W>& factor, i64 n,
                        i32 depth) {
    auto left = [&](i32 i, i32 k) {
        const f32* row = rows.row(i);
        return row == nullptr ? 0.0f : row[k];
    };
    auto right = [&](i32 j, i32 k) { return factor.at(n + j, k); };
    if (factor.deep == 1) {
        tile.template add<ALONG_DEPTH, ALONG_DEPTH>(stage, depth, left, right);
    } else {
        tile.template add<ALONG_DEPTH, ACROSS>(stage, depth, left, right);
    }
}

template <class W, class OUT>
DEVICE void grouped_exact(const f32* left, const i32* left_slots, const W* weight, i64 stride, i64 deep,
                          const StackScales& scales, const f32* left2, const f32* right2, i64 stride2, i64 deep2,
                          const i32* tiles, const i32* offsets, OUT* out, f32* copy, f32 copy_scale, i32 top, i32 columns,
                          i32 depth, i32 depth2, i32 accumulate) {
    SHARED(f32, stage, PRODUCT_STAGE<TILE>);
    Group group;
    if (!group.find(tiles, offsets, i32(blockIdx.x), TILE)) return;
    i64 n = i64(blockIdx.y) * TILE, size = i64(columns) * depth;
    Factor<W> factor{weight + group.expert * stored<W>(size), {}, columns, stride, deep};
    if constexpr (sizeof(W) == 1) factor.scales = scales.of(group.expert);
    Factor<f32> low_rank{right2 + i64(group.expert) * columns * depth2, {}, columns, stride2, deep2};
    Product<f32, TILE> tile;
    tile.clear();
    add_product(tile, stage, GroupRows<f32>{left, left_slots, group, top, depth}, factor, n, depth);
    add_product(tile, stage, GroupRows<f32>{left2, nullptr, group, top, depth2}, low_rank, n, depth2);
    tile.each([&](i32 i, i32 j, f32 value) {
        if (group.first + i >= group.end || n + j >= columns) return;
        i64 place = i64(group.first + i) * columns + n + j;
        if (accumulate) value += to_f32(out[place]);
        if (out != nullptr) out[place] = from_f32<OUT>(value);
        if (copy != nullptr) copy[place] = copy_scale * value;
    });
}

// left [M, rows] in grouped order, right [·, columns]; gradient [E, rows, columns], or [E, columns, rows] if transposed.
ENTRY(THREADS)
grouped_exact_outer(const f32* __restrict__ left, const f32* __restrict__ right, const i32* __restrict__ right_slots,
                    const i32* __restrict__ offsets, f32* __restrict__ gradient, i32 top, i32 rows, i32 columns, f32 scale,
                    i32 transposed) {
    SHARED(f32, stage, PRODUCT_STAGE<TILE>);
    Group group;
    if (!group.all(offsets, i32(blockIdx.z))) return;
    i64 m = i64(blockIdx.x) * TILE, n = i64(blockIdx.y) * TILE;
    gradient += i64(group.expert) * rows * columns;
    GroupRows<f32> of_left{left, nullptr, group, top, rows}, of_right{right, right_slots, group, top, columns};
    Product<f32, TILE> tile;
    tile.clear();
    tile.template add<ACROSS, ACROSS>(
        stage, group.end - group.first, [&](i32 i, i32 k) { return m + i < rows ? of_left.row(k)[m + i] : 0.0f; },
        [&](i32 j, i32 k) { return n + j < columns ? of_right.row(k)[n + j] : 0.0f; });
    tile.each([&](i32 i, i32 j, f32 value) {
        i64 row = m + i, column = n + j;
        if (row < rows && column < columns) gradient[transposed ? column * rows + row : row * columns + column] += scale * value;
    });
}

#define GROUPED(W, OUT)                                                                                                      \
    ENTRY(THREADS, 2)                                                                                                        \
    grouped_exact_##W##_##OUT(                                                                                               \
        const f32* __restrict__ left, const i32* __restrict__ left_slots, const W* __restrict__ weight,                      \
        const f32* __restrict__ absmax, const u8* __restrict__ nested_codes, const f32* __restrict__ nested_map,             \
        const f32* __restrict__ nested_offsets, i64 weight_stride, i64 weight_deep, const f32* __restrict__ left2,           \
        const f32* __restrict__ right2, i64 right2_stride, i64 right2_deep, const i32* __restrict__ tiles,                   \
        const i32* __restrict__ offsets, OUT* __restrict__ out, f32* __restrict__ copy, f32 copy_scale, i32 top,             \
        i32 columns, i32 depth, i32 depth2, i32 accumulate) {                                                                \
        StackScales scales{absmax, nested_codes, nested_map, nested_offsets,                                                 \
                           (i64(columns) * depth + NF4_BLOCK - 1) / NF4_BLOCK};                                              \
        grouped_exact<W, OUT>(left, left_slots, weight, weight_stride, weight_deep, scales, left2, right2, right2_stride,    \
                              right2_deep, tiles, offsets, out, copy, copy_scale, top, columns, depth, depth2, accumulate);  \
    }
GROUPED(f32, f32)
GROUPED(f32, bf16)
GROUPED(bf16, f32)
GROUPED(bf16, bf16)
GROUPED(f16, f32)
GROUPED(f16, bf16)
GROUPED(u8, f32)
GROUPED(u8, bf16)
