// Layers of routed experts on tensor cores: each expert's own matrix and adapter, for its own rows.
//
//   grouped_rows      out_m = left_m W_eᵀ + left2_m right2_eᵀ          y  = x W_eᵀ + (s u) B_eᵀ,  u = x A_eᵀ
//   grouped_columns   out_m = left_m W_e + left2_m right2_e            dx = dy W_e + v A_e,       v = s dy B_e
//   grouped_outer     gradient_e += scale · Σ_m left_mᵀ right_m        dA = vᵀ x,  dBᵀ = s uᵀ dy; straight or transposed
//   grouped_tiles     which expert and rows each block of the first two has
//   decode_stack      every expert's matrix in bf16, for matrices whose rows are no multiples of 32 elements
//
// for every grouped row m of expert e. Tensors: left by token [T, K] or grouped [M, K] bf16; left2 [M, R] bf16 in grouped order;
// W [E, N, K] or [E, K, N] bf16 or NF4 codes; right2 [E, N, R] or [E, R, N] bf16; out f32 or bf16 [M, N], replaced or added to;
// `copy` gets bf16(copy_scale · out); either may be left out. offsets i32 [E + 1], slots i32 [M] as moe.cu's `group` writes them.
//
// Bytes: W of the experts that have rows once (0.5 byte an element in NF4), left and out once a slot. Below about 200 rows an
// expert on an H200 (bf16) or 60 (NF4) limited by memory.
//
// Decomposition: tiles as in tile.cuh. y and dx: 64 × 128, four warps: an expert of few rows wastes at most 63 of them; u and v,
// as narrow as the rank, 32 × 64. A block has rows of one expert only; experts without rows have no block, and rows are gathered
// by the copies to shared memory, so no grouped copy of x exists. Blocks that share an expert's columns follow each other.
// The outer products: a block has 32 × 64 elements of one expert's gradient and goes through that expert's rows in their order, so
// sums need neither atomics nor parts.
//
// Numerics: as matmul.cu. The second term's left factor, s u or v, is rounded to bf16.

#include "tile.cuh"
#include "grouped.cuh"

// Launched by these names; gpu/moe/tensor.rs has the same numbers.
using Wide = Tile<64, 128, 2, 2, 3>;
using Narrow = Tile<32, 64, 1, 4, 4>;

constexpr i32 THREADS = 256;

// One block. Experts' tiles follow each other, an expert's in the order of its rows; the rest of `tiles` says −1.
ENTRY(THREADS)
grouped_tiles(const i32* __restrict__ offsets, i32* __restrict__ tiles, i32 experts, i32 height, i32 count) {
    SHARED(i32, total, 1);
    if (warp_index() == 0) {
        i32 each = (experts + WARP_LANES - 1) / WARP_LANES;
        i32 begin = min(lane_index() * each, experts), end = min(begin + each, experts);
        auto of = [&](i32 e) { return (offsets[e + 1] - offsets[e] + height - 1) / height; };
        i32 own = 0;
        for (i32 e = begin; e < end; e++) own += of(e);
        i32 through = warp_sum_through(own);
        i32 tile = through - own;
        for (i32 e = begin; e < end; e++) {
            for (i32 i = 0; i < of(e); i++, tile++) {
                if (tile >= count) continue;  // of no routing that `route` wrote
                tiles[2 * tile] = e;
                tiles[2 * tile + 1] = offsets[e] + i * height;
            }
        }
        if (lane_index() == WARP_LANES - 1) total[0] = through;
    }
    __syncthreads();
    for (i32 tile = total[0] + i32(threadIdx.x); tile < count; tile += THREADS) tiles[2 * tile] = -1, tiles[2 * tile + 1] = 0;
}

// What is done with a finished tile of grouped rows.
template <class OUT>
struct GroupEpilogue {
    OUT* out;
    bf16* copy;
    f32 copy_scale;
    i32 accumulate;
    Group group;
    i64 columns;

    DEVICE void operator()(i32 row, i64 column, Pack pack) const {
        if (group.first + row >= group.end || column >= columns) return;
        bool aligned = columns % PACK == 0;
        i64 at = i64(group.first + row) * columns;
        if (accumulate) {
            Pack old = load_pack(out + at, column, columns, aligned);
#pragma unroll
            for (i32 i = 0; i < PACK; i++) pack.at[i] += old.at[i];
        }
        if (out != nullptr) store_pack(out + at, column, columns, aligned, pack);
        if (copy == nullptr) return;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) pack.at[i] *= copy_scale;
        store_pack(copy + at, column, columns, aligned, pack);
    }
};

// One expert's matrix of `rows` × `width`.
DEVICE DenseRight expert_factor(const bf16* weight, const StackScales&, i32 expert, i64 rows, i64 width) {
    return {{weight + expert * rows * width, rows, width}};
}
DEVICE Nf4Right expert_factor(const u8* codes, const StackScales& scales, i32 expert, i64 rows, i64 width) {
    SHARED(f32, table, 16);
    nf4_table(table);
    __syncthreads();
    Nf4Right right;
    right.codes = codes + expert * stored<u8>(rows * width), right.scales = scales.of(expert);
    right.count = rows, right.width = width, right.table = table;
    return right;
}

// A left factor whose rows were looked up beforehand: where each row of the tile lies, or −1, in shared memory.
struct FoundRows {
    const bf16* values;
    const i32* rows;
    i64 width;

    DEVICE const bf16* row(i64 index) const { return rows[index] < 0 ? nullptr : values + rows[index] * width; }
};

template <class T, bool COLUMNS, class W, class OUT>
DEVICE void grouped(const bf16* left, const i32* left_slots, const W* weight, const StackScales& scales, const bf16* left2,
                    const bf16* right2, const i32* tiles, const i32* offsets, GroupEpilogue<OUT> epilogue, i32 top, i32 depth,
                    i32 depth2) {
    DYNAMIC_SHARED(memory);
    Group group;
    if (!group.find(tiles, offsets, i32(blockIdx.x), T::M)) return;
    i64 n = i64(blockIdx.y) * T::N, columns = epilogue.columns;
    auto right = expert_factor(weight, scales, group.expert, COLUMNS ? depth : columns, COLUMNS ? columns : depth);
    DenseRight low_rank = expert_factor(right2, scales, group.expert, COLUMNS ? depth2 : columns, COLUMNS ? columns : depth2);
    SHARED(i32, sources, T::M);
    SHARED(i32, own_rows, T::M);
    for (i32 i = i32(threadIdx.x); i < T::M; i += T::THREADS) {
        i32 row = group.first + i;
        own_rows[i] = row < group.end ? row : -1;
        sources[i] = row >= group.end ? -1 : left_slots == nullptr ? row : left_slots[row] / top;
    }
    __syncthreads();
    Sums<T> sums;
    FoundRows rows{left, sources, depth}, rows2{left2, own_rows, depth2};
    multiply_tile<T, false, COLUMNS>(sums, reinterpret_cast<bf16*>(memory), 0, n, rows, right, depth, rows2, low_rank, depth2);
    epilogue.group = group;
    for_each_pack<T>(sums, memory, [&](i32 row, i32 column, const Pack& pack) { epilogue(row, n + column, pack); });
}

// Rows of a group as a right factor.
struct GroupRight {
    GroupRows<bf16> matrix;

    template <class T, bool COLUMNS>
    DEVICE void copy(bf16* tile, i64 first, i32 depth) const {
        static_assert(COLUMNS, "the depth of an outer product is its rows");
        copy_rectangle<T::K, T::N, T::THREADS>(tile, matrix, depth, first);
    }
    template <class T, bool COLUMNS>
    DEVICE void fetch(i64, i32) {}
    DEVICE void advance() {}
    template <class T, bool COLUMNS>
    DEVICE void decode(bf16*, i32) const {}
};

template <class T>
DEVICE void outer(const bf16* left, const bf16* right, const i32* right_slots, const i32* offsets, f32* gradient, i32 top,
                  i32 rows, i32 columns, f32 scale, i32 transposed) {
    DYNAMIC_SHARED(memory);
    Group group;
    if (!group.all(offsets, i32(blockIdx.z))) return;
    i64 m = i64(blockIdx.x) * T::M, n = i64(blockIdx.y) * T::N;
    gradient += i64(group.expert) * rows * columns;
    GroupRows<bf16> of_left{left, nullptr, group, top, rows};
    GroupRight of_right{{right, right_slots, group, top, columns}};
    Sums<T> sums;
    multiply_tile<T, true, true>(sums, reinterpret_cast<bf16*>(memory), m, n, of_left, of_right, group.end - group.first, of_left,
                                 DenseRight{{right, 0, columns}}, 0);
    for_each_pack<T>(sums, memory, [&](i32 within, i32 first, const Pack& pack) {
        i64 row = m + within;
        if (row >= rows) return;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
            i64 column = n + first + i;
            if (column < columns) gradient[transposed ? column * rows + row : row * columns + column] += scale * pack.at[i];
        }
    });
}

// values [E, size] from codes; a thread an element.
ENTRY(THREADS)
decode_stack(const u8* __restrict__ codes, const f32* __restrict__ absmax, const u8* __restrict__ nested_codes,
             const f32* __restrict__ nested_map, const f32* __restrict__ nested_offsets, bf16* __restrict__ values, i32 experts,
             i64 size) {
    i64 i = global_thread();
    if (i >= experts * size) return;
    i32 expert = i32(i / size);
    i64 element = i - expert * size;
    StackScales scales{absmax, nested_codes, nested_map, nested_offsets, (size + NF4_BLOCK - 1) / NF4_BLOCK};
    u32 code = codes[expert * stored<u8>(size) + element / 2] >> (element % 2 ? 0 : 4) & 15;
    values[i] = from_f32<bf16>(NF4_VALUES[code] * scales.of(expert).of(element / NF4_BLOCK));
}

// left [M, rows] in grouped order, right [·, columns]; gradient [E, rows, columns], or [E, columns, rows] if transposed.
ENTRY(Narrow::THREADS, Narrow::BLOCKS)
grouped_outer(const bf16* __restrict__ left, const bf16* __restrict__ right, const i32* __restrict__ right_slots,
              const i32* __restrict__ offsets, f32* __restrict__ gradient, i32 top, i32 rows, i32 columns, f32 scale,
              i32 transposed) {
    outer<Narrow>(left, right, right_slots, offsets, gradient, top, rows, columns, scale, transposed);
}

#define GROUPED(name, T, tile, COLUMNS, W, OUT)                                                                              \
    ENTRY(T::THREADS, T::BLOCKS)                                                                                             \
    grouped_##name##_##tile##_##W##_##OUT(                                                                                   \
        const bf16* __restrict__ left, const i32* __restrict__ left_slots, const W* __restrict__ weight,                     \
        const f32* __restrict__ absmax, const u8* __restrict__ nested_codes, const f32* __restrict__ nested_map,             \
        const f32* __restrict__ nested_offsets, const bf16* __restrict__ left2, const bf16* __restrict__ right2,             \
        const i32* __restrict__ tiles, const i32* __restrict__ offsets, OUT* __restrict__ out, bf16* __restrict__ copy,      \
        f32 copy_scale, i32 top, i32 columns, i32 depth, i32 depth2, i32 accumulate) {                                       \
        StackScales scales{absmax, nested_codes, nested_map, nested_offsets,                                                 \
                           (i64(columns) * depth + NF4_BLOCK - 1) / NF4_BLOCK};                                              \
        GroupEpilogue<OUT> epilogue{out, copy, copy_scale, accumulate, {}, columns};                                         \
        grouped<T, COLUMNS>(left, left_slots, weight, scales, left2, right2, tiles, offsets, epilogue, top, depth, depth2);  \
    }
GROUPED(rows, Wide, wide, false, bf16, f32)
GROUPED(rows, Wide, wide, false, bf16, bf16)
GROUPED(rows, Wide, wide, false, u8, f32)
GROUPED(rows, Wide, wide, false, u8, bf16)
GROUPED(columns, Wide, wide, true, bf16, f32)
GROUPED(columns, Wide, wide, true, bf16, bf16)
GROUPED(columns, Wide, wide, true, u8, f32)
GROUPED(columns, Wide, wide, true, u8, bf16)
GROUPED(rows, Narrow, narrow, false, bf16, f32)
GROUPED(columns, Narrow, narrow, true, bf16, f32)
