// Products of activations with frozen matrices by Hopper's tensor cores: what matmul.cu does, for sm_90a.
//
//   hopper_rows      out [M, N] = left [M, K] · W [N, K]ᵀ + left2 [M, R] · right2 [N, R]ᵀ + bias
//   hopper_columns   out [M, N] = left [M, K] · W [K, N]  + left2 [M, R] · right2 [R, N]
//
// or, where there are too few tiles of the result for a device, `sums` [S, M, N] of S parts of the depth, each `part` deep, without bias;
// sum_parts of matmul.cu adds them in their order.
//
// Tensors: left, left2 bf16 by maps; W bf16 or NF4 codes by a map, codes with scales as in nf4.cuh; right2 bf16; out bf16, replaced or
// added to. K, N and R are multiples of 8 (rows begin at 16 bytes, which the copy engine wants); in NF4, blocks do not cross rows.
// The contract is matmul.cu's, and that is the twin which does what this cannot.
//
// Bytes: as matmul.cu, but W crosses from the second level of cache M / N times, and left (outputs / 128) times.
//
// Decomposition: hopper_tile.cuh. As many blocks as multiprocessors, each with every so many-th tile of 128 outputs by 64 (`narrow`),
// 128 (`middle`) or 256 (`wide`) tokens. In bands of 2048 tokens, tokens change fastest: the tiles under way at one time share a few
// rows of W and a band of tokens, which together fit the second level of cache.

#include "hopper_tile.cuh"

constexpr i32 BAND_TOKENS = 2048;

// All tiles of one matrix.
template <class T>
struct MatrixTiles {
    i64 rows;
    i32 depth, part;  // of all, and of a part: no less than the depth if there is one
    Nf4Scales of_matrix;
    HopperOutput output;
    f32* sums;  // null if there is one part

    DEVICE i64 row_tiles() const { return (rows + T::N - 1) / T::N; }
    DEVICE i64 column_tiles() const { return (output.columns + HOPPER_OUTPUTS - 1) / HOPPER_OUTPUTS; }
    DEVICE i64 tiles() const { return row_tiles() * column_tiles(); }
    DEVICE i64 count() const { return sums == nullptr ? tiles() : tiles() * ((depth + part - 1) / part); }

    DEVICE bool find(i64 index, HopperJob& job) const {
        constexpr i32 BAND = BAND_TOKENS / T::N;
        job.part = 0, job.from = 0, job.to = depth;
        if (sums != nullptr) {
            job.part = i32(index / tiles()), index -= job.part * tiles();
            job.from = job.part * part, job.to = min(depth, job.from + part);
        }
        i64 of_band = BAND * column_tiles(), band = index / of_band, within = index % of_band;
        i64 height = min(i64(BAND), row_tiles() - band * BAND);
        job.row = (band * BAND + within % height) * T::N;
        job.column = i32(within / height) * HOPPER_OUTPUTS;
        job.end = rows, job.expert = 0;
        return true;
    }
    DEVICE Nf4Scales scales(const HopperJob&, i32) const { return of_matrix; }
    DEVICE bool gathers() const { return false; }
    DEVICE i32 gathered(const HopperJob&, i32) const { return -1; }
    DEVICE void store(const HopperJob& job, i32 token, i32 column, Pack& pack) const {
        i64 row = job.row + token;
        if (row >= job.end) return;
        if (sums == nullptr) {
            output.store(row, column, pack);
        } else if (column < output.columns) {
            store_wide(sums + (job.part * rows + row) * output.columns + column, pack);
        }
    }
};

#define HOPPER(name, COLUMNS, size, N, W)                                                                                 \
    ENTRY(HOPPER_THREADS, 1)                                                                                              \
    hopper_##name##_##size##_##W(                                                                                         \
        MAP left, MAP weight, const f32* __restrict__ absmax, const u8* __restrict__ nested_codes,                        \
        const f32* __restrict__ nested_map, f32 offset, MAP left2, const bf16* __restrict__ right2,                       \
        const f32* __restrict__ bias_f32, const bf16* __restrict__ bias_bf16, bf16* __restrict__ out,                     \
        f32* __restrict__ sums, i64 rows, i32 columns, i32 depth, i32 depth2, i32 part, i32 accumulate) {                 \
        using T = HopperTile<N, COLUMNS, W>;                                                                              \
        Nf4Scales scales{absmax, nested_codes, nested_map, offset};                                                       \
        MatrixTiles<T> tiles{rows, depth, part, scales, {bias_f32, bias_bf16, out, columns, accumulate}, sums};           \
        hopper_product<T>({&left, &weight, &left2, right2, columns, depth, depth2}, tiles);                               \
    }
HOPPER(rows, false, narrow, 64, bf16)
HOPPER(rows, false, narrow, 64, u8)
HOPPER(rows, false, middle, 128, bf16)
HOPPER(rows, false, middle, 128, u8)
HOPPER(rows, false, wide, 256, bf16)
HOPPER(rows, false, wide, 256, u8)
HOPPER(columns, true, narrow, 64, bf16)
HOPPER(columns, true, narrow, 64, u8)
HOPPER(columns, true, middle, 128, bf16)
HOPPER(columns, true, middle, 128, u8)
HOPPER(columns, true, wide, 256, bf16)
HOPPER(columns, true, wide, 256, u8)
