// The products of cross_entropy.cu by Hopper's tensor cores, for sm_90a.
//
//   hopper_logits     out [R, P] = left [R, C] · W [V, C]ᵀ                               z of a chunk of rows
//   hopper_head_dx    out [S, R, C] = left [R, P] · W [V, C], V cut into S parts         dz · W, to be added in the parts' order
//
// Tensors: left bf16 by a map; W bf16 or NF4 codes by a map, codes with scales as in nf4.cuh; out f32. `count` has the number of
// supervised rows, of which the chunk's begin with `first`: tiles of rows that do not exist are passed over. V and C are multiples of
// 8; in NF4, blocks do not cross rows. The rest of the op, and the twins that do what these cannot, are in cross_entropy.cu.
//
// Bytes of a chunk: W once in each product, since a chunk of the usual 256 rows is one tile high; left and out once.
//
// Decomposition: hopper_tile.cuh, 256 tokens a tile whatever the chunk, so that a row's bits do not depend on it. Rows change fastest,
// then outputs, then parts: what is under way at one time shares a few rows of W.
//
// Numerics: as cross_entropy.cu.

#include "cross_entropy.cuh"
#include "hopper_tile.cuh"

// All tiles of a chunk.
template <class T>
struct HeadTiles {
    const i32* supervised;
    i64 first;
    i32 chunk, columns, depth, part;
    Nf4Scales of_head;
    f32* out;
    i64 pitch;  // of a row of `out`

    DEVICE i64 row_tiles() const { return (chunk + T::N - 1) / T::N; }
    DEVICE i64 column_tiles() const { return (columns + HOPPER_OUTPUTS - 1) / HOPPER_OUTPUTS; }
    DEVICE i64 count() const { return row_tiles() * column_tiles() * ((depth + part - 1) / part); }

    DEVICE bool find(i64 index, HopperJob& job) const {
        job.row = index % row_tiles() * T::N, index /= row_tiles();
        job.column = i32(index % column_tiles()) * HOPPER_OUTPUTS;
        job.part = i32(index / column_tiles()), job.from = job.part * part, job.to = min(depth, job.from + part);
        job.end = rows_of_chunk(supervised, first, chunk), job.expert = 0;
        return job.row < job.end;
    }
    DEVICE Nf4Scales scales(const HopperJob&, i32) const { return of_head; }
    DEVICE bool gathers() const { return false; }
    DEVICE i32 gathered(const HopperJob&, i32) const { return -1; }
    DEVICE void store(const HopperJob& job, i32 token, i32 column, const Pack& pack) const {
        i64 row = job.row + token;
        if (row < job.end && column < columns) store_wide(out + (i64(job.part) * chunk + row) * pitch + column, pack);
    }
};

#define HOPPER_HEAD(name, COLUMNS, W)                                                                                      \
    ENTRY(HOPPER_THREADS, 1)                                                                                               \
    hopper_##name##_##W(MAP left, MAP head, const f32* __restrict__ absmax, const u8* __restrict__ nested_codes,           \
                        const f32* __restrict__ nested_map, f32 offset, const i32* __restrict__ count,                     \
                        f32* __restrict__ out, i64 first, i32 chunk, i32 columns, i32 depth, i32 part, i64 pitch) {        \
        using T = HopperTile<256, COLUMNS, W>;                                                                             \
        Nf4Scales scales{absmax, nested_codes, nested_map, offset};                                                        \
        HeadTiles<T> tiles{count, first, chunk, columns, depth, part, scales, out, pitch};                                 \
        hopper_product<T>({&left, &head, &left, nullptr, columns, depth, 0}, tiles);                                       \
    }
HOPPER_HEAD(logits, false, bf16)
HOPPER_HEAD(logits, false, u8)
HOPPER_HEAD(head_dx, true, bf16)
HOPPER_HEAD(head_dx, true, u8)
