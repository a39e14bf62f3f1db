// The products of cross_entropy.cu by Hopper's tensor cores, for sm_90a.
//
//   hopper_logits     z [R, V] = left [R, C] · W [V, C]ᵀ, of which exponentials are left       as cross_entropy.cuh says
//   hopper_head_dx    out [S, R, C] = left [R, P] · W [V, C], V cut into S parts              to be added in the parts' order
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

// All tiles of a chunk. OUT takes what they leave.
template <class T, class OUT>
struct HeadTiles {
    const i32* supervised;
    i64 first;
    i32 chunk, columns, depth, part;
    Nf4Scales of_head;
    OUT out;

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
    // The lanes of 64 columns come together.
    DEVICE void store(const HopperJob& job, i32 token, i32 column, Pack& pack) const {
        i64 row = job.row + token;
        out.store(i64(job.part) * chunk + row, column, row < job.end, pack);
    }
};

// Parts of dx [S, R, C].
struct Parts {
    f32* parts;
    i32 width;

    DEVICE void store(i64 row, i32 column, bool exists, const Pack& pack) const {
        if (exists && column < width) store_wide(parts + row * width + column, pack);
    }
};

#define HOPPER_LOGITS(W)                                                                                                   \
    ENTRY(HOPPER_THREADS, 1)                                                                                               \
    hopper_logits_##W(MAP left, MAP head, const f32* __restrict__ absmax, const u8* __restrict__ nested_codes,             \
                      const f32* __restrict__ nested_map, f32 offset, const i32* __restrict__ count,                       \
                      const i32* __restrict__ labels, bf16* __restrict__ powers, f32* __restrict__ runs,                   \
                      f32* __restrict__ label_logits, i64 first, i32 chunk, i32 width, i32 vocabulary, i64 pitch) {        \
        using T = HopperTile<256, false, W>;                                                                               \
        Nf4Scales scales{absmax, nested_codes, nested_map, offset};                                                        \
        HeadTiles<T, Exponentials> tiles{                                                                                  \
            count, first, chunk, vocabulary, width, width, scales, {labels, powers, runs, label_logits, vocabulary, pitch}}; \
        hopper_product<T>({&left, &head, &left, nullptr, vocabulary, width, 0}, tiles);                                    \
    }
HOPPER_LOGITS(bf16)
HOPPER_LOGITS(u8)

#define HOPPER_HEAD_DX(W)                                                                                                  \
    ENTRY(HOPPER_THREADS, 1)                                                                                               \
    hopper_head_dx_##W(MAP left, MAP head, const f32* __restrict__ absmax, const u8* __restrict__ nested_codes,            \
                       const f32* __restrict__ nested_map, f32 offset, const i32* __restrict__ count,                      \
                       f32* __restrict__ parts, i64 first, i32 chunk, i32 width, i32 vocabulary, i32 part) {               \
        using T = HopperTile<256, true, W>;                                                                                \
        Nf4Scales scales{absmax, nested_codes, nested_map, offset};                                                        \
        HeadTiles<T, Parts> tiles{count, first, chunk, width, vocabulary, part, scales, {parts, width}};                   \
        hopper_product<T>({&left, &head, &left, nullptr, width, vocabulary, 0}, tiles);                                    \
    }
HOPPER_HEAD_DX(bf16)
HOPPER_HEAD_DX(u8)
