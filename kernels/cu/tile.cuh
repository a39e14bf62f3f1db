// The tensor-core tile: a block multiplies one M × N tile of a product of bf16 factors, with f32 sums.
//
//   sum [M, N] = Σ over tiles of 64 in depth of  left [M, 64] · right [64, N]
//
// Decomposition: warps share the tile as WARPS_M × WARPS_N; each keeps its part of the sum in registers, in fragments of 16 × 8
// (see multiply_add). Factors go through a ring of STAGES tiles in shared memory, so that the tile STAGES − 1 steps ahead is
// under way while one is multiplied: rows of both factors by `cp.async`, codes of a 4-bit factor through registers, where they
// are decoded between the products. One barrier a step.
//
// Shared memory: tiles are kept as their matrices lie in memory, rows of 16-byte chunks, swizzled (see `swizzled`): neither the
// copies nor the fragments' loads meet a bank twice. A factor whose depth runs along columns of memory is transposed by
// `load_matrices_transposed` on its way to the fragments, so a transposed read costs what a straight one does.
//
//   left   `rows`: [M, 64], depth along the rows of memory;  `columns`: [64, M]
//   right  `rows`: [N, 64], as W in x · Wᵀ;                  `columns`: [64, N], as W in dy · W
//
// Any extents: what lies beyond the depth is zero and not read; rows and columns beyond a matrix repeat others, and nobody stores
// what they give. Matrices whose rows do not begin at 16-byte boundaries are read element by element, but for 4-bit ones, which
// the host decodes beforehand.
//
// Addresses: a thread's part of a tile lies a constant from its part of the tile before, so each factor keeps one pointer (`Feed`)
// and a chunk costs one addition; what is rare (ragged rows, the low-rank term) is kept out of the registers of the loop.

#pragma once
#include "nf4.cuh"

// Shared memory of a multiprocessor, what the system takes left out.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
constexpr i32 SHARED_KILOBYTES = 227;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr i32 SHARED_KILOBYTES = 163;
#else
constexpr i32 SHARED_KILOBYTES = 99;
#endif

template <i32 M_, i32 N_, i32 WARPS_M_, i32 WARPS_N_, i32 STAGES_>
struct Tile {
    static constexpr i32 M = M_, N = N_, K = 64, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
    static constexpr i32 THREADS = WARPS_M * WARPS_N * WARP_LANES;
    // Of a warp: rows, columns, and fragments of 16 rows or 8 columns.
    static constexpr i32 WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;
    static constexpr i32 ROWS = WARP_M / 16, COLUMNS = WARP_N / 8;
    // Of a stage, in elements.
    static constexpr i32 LEFT = M * K, RIGHT = N * K, STAGE = LEFT + RIGHT;
    static constexpr i32 STAGES_BYTES = STAGES * STAGE * 2;
    // The finished tile as f32, with rows 8 apart in banks.
    static constexpr i32 PITCH = N + 8;
    static constexpr i32 RESULT_BYTES = M * PITCH * 4;
    static constexpr i32 SHARED_BYTES = STAGES_BYTES > RESULT_BYTES ? STAGES_BYTES : RESULT_BYTES;
    // Blocks that fit a multiprocessor's shared memory, which is what registers are divided by.
    static constexpr i32 BLOCKS = SHARED_KILOBYTES * 1024 / (SHARED_BYTES + 1024);
    static_assert(BLOCKS > 0, "more shared memory than the target has");
    static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "fragments are loaded in pairs");
};

// A warp's part of the sum.
template <class T>
struct Sums {
    f32 at[T::ROWS][T::COLUMNS][4] = {};
};

// ---- rectangles of matrices, to shared memory -----------------------------------------------------------------------

// A row-major bf16 matrix.
struct Rows {
    const bf16* values;
    i64 count, width;

    // Where a row begins; null beyond the last.
    DEVICE const bf16* row(i64 index) const { return index < count ? values + index * width : nullptr; }
};

// How a block's threads share a rectangle of HEIGHT rows of WIDTH elements: each copies COUNT chunks of 16 bytes, all in one
// column of chunks and in rows APART rows apart. The swizzle repeats every eight rows, so in a tile the chunks of a thread lie a
// constant distance from each other.
template <i32 HEIGHT, i32 WIDTH, i32 THREADS>
struct Share {
    static constexpr i32 CHUNKS = WIDTH / PACK, APART = THREADS / CHUNKS, COUNT = HEIGHT / APART;
    static_assert(THREADS % CHUNKS == 0 && HEIGHT % APART == 0 && APART % 8 == 0, "threads' chunks lie regularly");
    static DEVICE i32 row() { return i32(threadIdx.x) / CHUNKS; }
    static DEVICE i32 column() { return i32(threadIdx.x) % CHUNKS * PACK; }
    // Where this thread's chunk `i` goes.
    static DEVICE SharedAddress place(SharedAddress tile, i32 i) {
        return tile + swizzled<CHUNKS>(row(), i32(threadIdx.x) % CHUNKS) * 16 + i * (APART * WIDTH * 2);
    }
};

// Copies a rectangle whose rows do not begin at 16-byte boundaries, element by element and at once: rows from `row` on, columns
// from `column` on; zeros from row `row_end` and from column `column_end` on.
template <i32 HEIGHT, i32 WIDTH, i32 THREADS, class MATRIX>
__noinline__ __device__ void copy_ragged(SharedAddress tile, MATRIX matrix, i64 row, i64 row_end, i64 column, i64 column_end) {
    using Mine = Share<HEIGHT, WIDTH, THREADS>;
    column += Mine::column();
#pragma unroll 1
    for (i32 i = 0; i < Mine::COUNT; i++) {
        i64 own = row + Mine::row() + i * Mine::APART;
        const bf16* from = own < row_end ? matrix.row(own) : nullptr;
        u32 words[4] = {};
#pragma unroll
        for (i32 e = 0; e < PACK; e++)
            if (from != nullptr && column + e < column_end) words[e / 2] |= u32(from[column + e].bits) << 16 * (e % 2);
        store_shared(Mine::place(tile, i), make_uint4(words[0], words[1], words[2], words[3]));
    }
}

// So many rows of `row_bytes` below a place in memory, in one multiplication with an addition.
DEVICE const void* below(const bf16* from, i32 rows, i32 row_bytes) {
    return reinterpret_cast<const u8*>(from) + i64(rows) * row_bytes;
}

// A factor's tiles one after another in depth, as a thread copies its part of each. What does not change from tile to tile is
// found when it begins, so that a chunk costs one addition, and a tile a few more.
//
// ALONG: the depth runs along the rows of memory, of which the tile has SIZE, from `index` on. Rows beyond the last are a copy
// of the last one: they make sums that nobody stores. Otherwise the depth runs across them and the tile has SIZE columns;
// columns beyond the last are copies of the first ones. Beyond the depth there are zeros, or where it ends within 16 bytes of a
// row, what the row goes on with: the other factor has zeros there.
template <class T, i32 SIZE, bool ALONG, class MATRIX>
struct Feed;

template <class T, i32 SIZE>
struct Feed<T, SIZE, true, Rows> {
    using Mine = Share<SIZE, T::K, T::THREADS>;
    Rows matrix;
    i64 index;
    const bf16* from;  // this thread's first chunk of the next tile
    i32 last;          // how many rows below its own the last one is
    i32 left;          // of the depth, from that chunk on

    DEVICE void begin(const Rows& of, i64 first, i32 depth) {
        matrix = of, index = first;
        i64 row = first + Mine::row(), behind = of.count - 1 - row;
        last = behind < SIZE ? i32(behind) : SIZE;
        from = of.values + row * of.width + Mine::column();
        left = depth - Mine::column();
    }
    // From a depth on, a multiple of T::K.
    DEVICE void skip(i32 depth) { from += depth, left -= depth; }
    DEVICE void copy(SharedAddress tile) {
        if (matrix.width % PACK == 0) {
            i32 row_bytes = opaque(2 * i32(matrix.width)), most = opaque(last);
#pragma unroll
            for (i32 i = 0; i < Mine::COUNT; i++)
                copy_async(Mine::place(tile, i), below(from, min(i * Mine::APART, most), row_bytes), left > 0);
        } else {
            i64 column = from - Mine::column() - matrix.values - (index + Mine::row()) * matrix.width;
            copy_ragged<SIZE, T::K, T::THREADS>(tile, matrix, index, matrix.count, column, column + left + Mine::column());
        }
        skip(T::K);
    }
};

template <class T, i32 SIZE>
struct Feed<T, SIZE, false, Rows> {
    using Mine = Share<T::K, SIZE, T::THREADS>;
    Rows matrix;
    i64 index;
    const bf16* from;
    i32 left;  // of the depth, from this thread's first row on

    DEVICE void begin(const Rows& of, i64 first, i32 depth) {
        matrix = of, index = first;
        i64 column = first + Mine::column();
        from = of.values + Mine::row() * of.width + (column < of.width ? column : 0);
        left = depth - Mine::row();
    }
    DEVICE void skip(i32 depth) { from += depth * matrix.width, left -= depth; }
    DEVICE void copy(SharedAddress tile) {
        if (matrix.width % PACK == 0) {
            i32 row_bytes = opaque(2 * i32(matrix.width));
#pragma unroll
            for (i32 i = 0; i < Mine::COUNT; i++)
                copy_async(Mine::place(tile, i), below(from, i * Mine::APART, row_bytes), i * Mine::APART < left);
        } else {
            i64 row = (from - matrix.values) / matrix.width - Mine::row();
            copy_ragged<T::K, SIZE, T::THREADS>(tile, matrix, row, row + left + Mine::row(), index, matrix.width);
        }
        skip(T::K);
    }
};

// Any other matrix, asked for each row: MATRIX has `values`, `width` and `row`, as `Rows` has.
template <class T, i32 SIZE, bool ALONG, class MATRIX>
struct Feed {
    static constexpr i32 HEIGHT = ALONG ? SIZE : T::K, WIDTH = ALONG ? T::K : SIZE;
    using Mine = Share<HEIGHT, WIDTH, T::THREADS>;
    MATRIX matrix;
    i64 index;
    i32 done, depth;

    DEVICE void begin(const MATRIX& of, i64 first, i32 deep) { matrix = of, index = first, done = 0, depth = deep; }
    DEVICE void skip(i32 by) { done += by; }
    DEVICE void copy(SharedAddress tile) {
        i64 row = ALONG ? index : done, column = ALONG ? done : index;
        i64 row_end = ALONG ? index + SIZE : depth, column_end = ALONG ? depth : matrix.width;
        if (matrix.width % PACK == 0) {
            bool inside = column + Mine::column() < column_end;
            column = inside ? column + Mine::column() : 0;
#pragma unroll
            for (i32 i = 0; i < Mine::COUNT; i++) {
                i64 own = row + Mine::row() + i * Mine::APART;
                const bf16* from = own < row_end ? matrix.row(own) : nullptr;
                bool exists = from != nullptr;
                copy_async(Mine::place(tile, i), (exists ? from : matrix.values) + column, exists && inside);
            }
        } else {
            copy_ragged<HEIGHT, WIDTH, T::THREADS>(tile, matrix, row, row_end, column, column_end);
        }
        skip(T::K);
    }
};

// Rows that were looked up beforehand: where each row of the tile lies, or −1, in shared memory.
struct FoundRows {
    const bf16* values;
    const i32* rows;
    i64 width;

    DEVICE const bf16* row(i64 index) const { return rows[index] < 0 ? nullptr : values + rows[index] * width; }
};

// Of such rows a thread remembers where its own lie, in chunks of 16 bytes: 32 bits reach 64 GiB.
template <class T, i32 SIZE>
struct Feed<T, SIZE, true, FoundRows> {
    using Mine = Share<SIZE, T::K, T::THREADS>;
    FoundRows matrix;
    const bf16* from;
    u32 chunks[Mine::COUNT];
    i32 left;

    DEVICE void begin(const FoundRows& of, i64, i32 depth) {
        matrix = of;
        from = of.values;
        left = depth - Mine::column();
#pragma unroll
        for (i32 i = 0; i < Mine::COUNT; i++) {
            i32 row = max(of.rows[Mine::row() + i * Mine::APART], 0);
            chunks[i] = u32(row) * u32(of.width / PACK) + u32(Mine::column() / PACK);
        }
    }
    DEVICE void skip(i32 depth) { from += depth, left -= depth; }
    DEVICE void copy(SharedAddress tile) {
        if (matrix.width % PACK == 0) {
#pragma unroll
            for (i32 i = 0; i < Mine::COUNT; i++)
                copy_async(Mine::place(tile, i), reinterpret_cast<const u8*>(from) + i64(chunks[i]) * 16, left > 0);
        } else {
            i64 column = from - matrix.values;
            copy_ragged<SIZE, T::K, T::THREADS>(tile, matrix, 0, SIZE, column, column + left + Mine::column());
        }
        skip(T::K);
    }
};

// ---- right factors -------------------------------------------------------------------------------------------------
//
// A right factor is what it is of and, as `Feed`, its tiles one after another: COLUMNS, the depth runs across the rows of
// memory; N columns of the result. Dense ones copy; 4-bit ones read codes (`fetch`) one tile before they decode them (`decode`,
// between the products).

// A right factor in bf16. All of its work is the copy.
struct DenseRight {
    Rows matrix;

    template <class T, i32 N, bool COLUMNS>
    struct Feed {
        ::Feed<T, N, !COLUMNS, Rows> feed;

        DEVICE void begin(const DenseRight& of, i64 first, i32 depth) { feed.begin(of.matrix, first, depth); }
        DEVICE void skip(i32 depth) { feed.skip(depth); }
        DEVICE void copy(SharedAddress tile) { feed.copy(tile); }
        DEVICE void fetch() {}
        DEVICE void advance() {}
        DEVICE void decode(SharedAddress, i32) const {}
    };
};

// A right factor in NF4, `count` rows of `width` elements, a multiple of 32, the first of them row `skipped` of a matrix. A
// thread decodes one or two runs of 32 elements of each tile, in rows some apart: 16 bytes of codes in one access, and one scale.
struct Nf4Right {
    static constexpr i32 RUN = 32;

    const u8* codes;
    Nf4Scales scales;
    i64 count, width, skipped;
    const f32* table;  // the sixteen values, in shared memory
    i64 before = 0;    // elements of each row that are left out, a multiple of 64

    // From one tile to the next, codes and scales move by a constant: a tile is a multiple of 64 elements deep.
    template <class T, i32 N, bool COLUMNS>
    struct Feed {
        static constexpr i32 WIDTH = COLUMNS ? N : T::K, IN_ROW = WIDTH / RUN, APART = T::THREADS / IN_ROW;
        static constexpr i32 COUNT = N * T::K / RUN / T::THREADS;
        static_assert((COUNT == 1 || COUNT == 2) && APART % 8 == 0, "a thread decodes 32 or 64 elements of a tile");

        const u8* codes[COUNT];  // of the next tile's runs
        u32 block[COUNT];        // their scales; 32 bits reach 128 GiB of codes
        Nf4Scales scales;
        const f32* table;
        i64 code_step;
        u32 block_step;
        i32 left;   // of the depth, from this thread's runs on
        i32 place;  // of the first run's first chunk in a tile, in bytes
        // Codes and scales of the tile to be decoded, and of the one after it.
        uint4 words[COUNT], next_words[COUNT];
        f32 scale[COUNT], next_scale[COUNT];

        DEVICE void begin(const Nf4Right& of, i64 first, i32 depth) {
            i32 row = i32(threadIdx.x) / IN_ROW, column = i32(threadIdx.x) % IN_ROW * RUN;
            scales = of.scales, table = of.table;
            code_step = COLUMNS ? of.width * (T::K / 2) : T::K / 2;
            block_step = COLUMNS ? u32(of.width * T::K / NF4_BLOCK) : T::K / NF4_BLOCK;
            left = depth - (COLUMNS ? row : column);
            place = swizzled<WIDTH / PACK>(row, column / PACK) * 16;
#pragma unroll
            for (i32 run = 0; run < COUNT; run++) {
                next_words[run] = make_uint4(0, 0, 0, 0);
                i64 own_row = row + run * APART, own_column = column;
                if constexpr (COLUMNS) {
                    own_column = first + column < of.width ? first + column : column % of.width;
                } else {
                    own_row = first + own_row < of.count ? first + own_row : of.count - 1;
                    own_column += of.before;
                }
                i64 element = (of.skipped + own_row) * of.width + own_column;
                codes[run] = of.codes + element / 2;
                block[run] = u32(element / NF4_BLOCK);
            }
        }
        DEVICE void copy(SharedAddress) {}
        // Reads this thread's codes and scales of the next tile, to be decoded one step later.
        DEVICE void fetch() {
#pragma unroll
            for (i32 run = 0; run < COUNT; run++) {
                next_scale[run] = 0.0f;  // decodes to zeros, whatever the codes
                if (left > (COLUMNS ? run * APART : 0)) {
                    next_words[run] = *reinterpret_cast<const uint4*>(codes[run]);
                    next_scale[run] = scales.of(block[run]);
                }
                codes[run] += code_step, block[run] += block_step;
            }
            left -= T::K;
        }
        DEVICE void advance() {
#pragma unroll
            for (i32 run = 0; run < COUNT; run++) words[run] = next_words[run], scale[run] = next_scale[run];
        }
        // Decodes chunk `step` of four of each of this thread's runs into the tile.
        DEVICE void decode(SharedAddress tile, i32 step) const {
#pragma unroll
            for (i32 run = 0; run < COUNT; run++) {
                const uint4& all = words[run];
                u32 word = step == 0 ? all.x : step == 1 ? all.y : step == 2 ? all.z : all.w, halves[4];
                // Where the values of both codes of each byte lie in the table, in bytes: the first is in the high nibble.
                u32 firsts = word >> 2 & 0x3c3c3c3cu, seconds = word << 2 & 0x3c3c3c3cu;
#pragma unroll
                for (i32 i = 0; i < 4; i++)
                    halves[i] = bf16_pair(value(firsts, i) * scale[run], value(seconds, i) * scale[run]);
                store_shared((tile + place ^ step * 16) + run * (APART * WIDTH * 2),
                             make_uint4(halves[0], halves[1], halves[2], halves[3]));
            }
        }
        // The value whose place in the table is byte `i`.
        DEVICE f32 value(u32 places, i32 i) const {
            return *reinterpret_cast<const f32*>(reinterpret_cast<const u8*>(table) + byte_of(places, i));
        }
    };
};

// Two matrices of the same kind side by side: of a tile's N columns the first half are of one, the second of the other. Both
// begin at the same column.
template <class RIGHT>
struct PairRight {
    RIGHT of[2];

    template <class T, i32 N, bool COLUMNS>
    struct Feed {
        static_assert(!COLUMNS, "halves of a tile are rows of memory");
        typename RIGHT::template Feed<T, N / 2, false> feeds[2];

        DEVICE void begin(const PairRight& right, i64 first, i32 depth) {
            feeds[0].begin(right.of[0], first, depth), feeds[1].begin(right.of[1], first, depth);
        }
        DEVICE void skip(i32 depth) { feeds[0].skip(depth), feeds[1].skip(depth); }
        DEVICE void copy(SharedAddress tile) { feeds[0].copy(tile), feeds[1].copy(tile + N * T::K); }
        DEVICE void fetch() { feeds[0].fetch(), feeds[1].fetch(); }
        DEVICE void advance() { feeds[0].advance(), feeds[1].advance(); }
        DEVICE void decode(SharedAddress tile, i32 step) const {
            feeds[0].decode(tile, step), feeds[1].decode(tile + N * T::K, step);
        }
    };
};

// A frozen matrix as a right factor: bf16 elements, or codes. All threads call it.
DEVICE DenseRight right_factor(const bf16* weight, Nf4Scales, i64 rows, i64 width) { return {{weight, rows, width}}; }

DEVICE Nf4Right right_factor(const u8* codes, Nf4Scales scales, i64 rows, i64 width) {
    SHARED(f32, table, 16);
    nf4_table(table);
    __syncthreads();
    return {codes, scales, rows, width, 0, table};
}

// The same without its first rows.
DEVICE DenseRight below(const DenseRight& right, i64 rows) {
    return {{right.matrix.values + rows * right.matrix.width, right.matrix.count - rows, right.matrix.width}};
}
DEVICE Nf4Right below(Nf4Right right, i64 rows) {
    right.skipped += rows, right.count -= rows;
    return right;
}

// The same from a column on, a multiple of 64.
DEVICE DenseRight beyond(const DenseRight& right, i64 columns) {
    return {{right.matrix.values + columns, right.matrix.count, right.matrix.width}};
}
DEVICE Nf4Right beyond(Nf4Right right, i64 columns) {
    right.before += columns;
    return right;
}

// ---- fragments -----------------------------------------------------------------------------------------------------

// Where this lane's rows of the first fragments lie in a stage, in bytes. All others are an exclusive or and a constant away: the
// swizzle flips the low bits of a chunk's place, and so does going on along a row.
template <class T, bool LEFT_COLUMNS, bool RIGHT_COLUMNS>
struct Fragments {
    i32 left, right;

    DEVICE Fragments() {
        i32 lane = lane_index(), m = warp_index() / T::WARPS_N * T::WARP_M, n = warp_index() % T::WARPS_N * T::WARP_N;
        if constexpr (LEFT_COLUMNS) {
            left = swizzled<T::M / PACK>(lane / 16 * 8 + lane % 8, m / PACK + lane / 8 % 2) * 16;
        } else {
            left = swizzled<T::K / PACK>(m + lane % 16, lane / 16) * 16;
        }
        if constexpr (RIGHT_COLUMNS) {
            right = swizzled<T::N / PACK>(lane / 8 % 2 * 8 + lane % 8, n / PACK + lane / 16) * 16;
        } else {
            right = swizzled<T::K / PACK>(n + lane / 16 * 8 + lane % 8, lane / 8 % 2) * 16;
        }
        right += T::LEFT * 2;
    }

    // Rows `16 row .. + 16` of the warp's part, depth `16 step .. + 16`; `at` is this lane's place in the stage.
    static DEVICE void load_left(u32 (&a)[4], SharedAddress at, i32 row, i32 step) {
        if constexpr (LEFT_COLUMNS) {
            load_matrices_transposed(a, (at ^ row * 32) + step * 16 * (T::M * 2));
        } else {
            load_matrices(a, (at ^ step * 32) + row * 16 * (T::K * 2));
        }
    }
    // Columns `16 pair .. + 16`: two fragments, in b[0], b[1] and b[2], b[3].
    static DEVICE void load_right(u32 (&b)[4], SharedAddress at, i32 pair, i32 step) {
        if constexpr (RIGHT_COLUMNS) {
            load_matrices_transposed(b, (at ^ pair * 32) + step * 16 * (T::N * 2));
        } else {
            load_matrices(b, (at ^ step * 32) + pair * 16 * (T::K * 2));
        }
    }

    // One step of 16 in depth.
    static DEVICE void multiply(Sums<T>& sums, SharedAddress left_at, SharedAddress right_at, i32 step) {
        u32 a[T::ROWS][4], b[T::COLUMNS / 2][4];
#pragma unroll
        for (i32 row = 0; row < T::ROWS; row++) load_left(a[row], left_at, row, step);
#pragma unroll
        for (i32 pair = 0; pair < T::COLUMNS / 2; pair++) load_right(b[pair], right_at, pair, step);
#pragma unroll
        for (i32 row = 0; row < T::ROWS; row++) {
#pragma unroll
            for (i32 column = 0; column < T::COLUMNS; column++) {
                u32 factor[2] = {b[column / 2][column % 2 * 2], b[column / 2][column % 2 * 2 + 1]};
                multiply_add(sums.at[row][column], a[row], factor);
            }
        }
    }
};

// ---- the main loop -------------------------------------------------------------------------------------------------

// One term of a sum: left · right, so deep.
template <class LEFT, class RIGHT>
struct Term {
    LEFT left;
    RIGHT right;
    i32 depth;
};

template <class T>
DEVICE i32 tiles_of(i32 depth) {
    return (depth + T::K - 1) / T::K;
}

// Adds the terms and then one of low rank (none if its depth is 0), for the tile at (`m`, `n`). LEFT has `values`, `width` (less
// than 2³¹) and `row` as `Rows` has: a gather is another such type. `memory` holds the ring.
//
// The terms' tiles follow each other in the ring as if they were one product. The low-rank term, a tile or two, is found anew for
// each of its tiles, so that it costs the others no register.
template <class T, bool LEFT_COLUMNS, bool RIGHT_COLUMNS, i32 TERMS, class LEFT, class RIGHT, class LOW_RANK>
DEVICE void multiply_tile(Sums<T>& sums, bf16* memory, i64 m, i64 n, const Term<LEFT, RIGHT> (&terms)[TERMS],
                          const Term<LEFT, LOW_RANK>& low_rank) {
    static_assert(TERMS == 1 || TERMS == 2, "one term, or two");
    Feed<T, T::M, !LEFT_COLUMNS, LEFT> left;
    typename RIGHT::template Feed<T, T::N, RIGHT_COLUMNS> right;
    i32 first_tiles = tiles_of<T>(terms[0].depth), term_tiles = first_tiles;
    if constexpr (TERMS == 2) term_tiles += tiles_of<T>(terms[1].depth);
    i32 tiles = term_tiles + tiles_of<T>(low_rank.depth);
    left.begin(terms[0].left, m, terms[0].depth);
    right.begin(terms[0].right, n, terms[0].depth);
    auto fetch = [&](i32 tile) {
        if constexpr (TERMS == 2) {
            if (tile == first_tiles) right.begin(terms[1].right, n, terms[1].depth);
        }
        if (tile < term_tiles) right.fetch();
    };
    // Begins what is copied, of both factors of a tile; before the next one is fetched, which may begin another term.
    auto copy = [&](i32 tile, SharedAddress stage) {
        if (tile < term_tiles) {
            if constexpr (TERMS == 2) {
                if (tile == first_tiles) left.begin(terms[1].left, m, terms[1].depth);
            }
            left.copy(stage);
            right.copy(stage + T::LEFT * 2);
        } else if (tile < tiles) {
            Feed<T, T::M, !LEFT_COLUMNS, LEFT> low_left;
            typename LOW_RANK::template Feed<T, T::N, RIGHT_COLUMNS> low_right;
            i32 skipped = (tile - term_tiles) * T::K;
            low_left.begin(low_rank.left, opaque(m), low_rank.depth), low_left.skip(skipped);
            low_right.begin(low_rank.right, opaque(n), low_rank.depth), low_right.skip(skipped);
            low_left.copy(stage);
            low_right.copy(stage + T::LEFT * 2);
        }
    };
    constexpr i32 STAGE_BYTES = T::STAGE * 2;
    SharedAddress ring = shared_place(memory);
    Fragments<T, LEFT_COLUMNS, RIGHT_COLUMNS> fragments;
    fetch(0);
    for (i32 tile = 0; tile < T::STAGES - 1; tile++) {
        SharedAddress stage = ring + tile * STAGE_BYTES;
        right.advance();
        copy(tile, stage);
        fetch(tile + 1);
        if (tile < term_tiles) {
#pragma unroll
            for (i32 step = 0; step < 4; step++) right.decode(stage + T::LEFT * 2, step);
        }
        copies_commit();
    }
    i32 reading = 0, writing = (T::STAGES - 1) * STAGE_BYTES;
    for (i32 tile = 0; tile < tiles; tile++) {
        copies_wait<T::STAGES - 2>();
        __syncthreads();  // this tile is whole, and the one before it is done with
        i32 ahead = tile + T::STAGES - 1;
        SharedAddress stage = ring + writing;
        right.advance();
        copy(ahead, stage);
        copies_commit();
        fetch(ahead + 1);
        SharedAddress left_at = ring + (reading + fragments.left), right_at = ring + (reading + fragments.right);
#pragma unroll
        for (i32 step = 0; step < 4; step++) {
            fragments.multiply(sums, left_at, right_at, step);
            if (ahead < term_tiles) right.decode(stage + T::LEFT * 2, step);
        }
        writing = reading;
        reading = reading == (T::STAGES - 1) * STAGE_BYTES ? 0 : reading + STAGE_BYTES;
    }
    copies_wait<0>();
    __syncthreads();  // the ring is free
}

// The same for one term alone.
template <class T, bool LEFT_COLUMNS, bool RIGHT_COLUMNS, class LEFT, class RIGHT>
DEVICE void multiply_tile(Sums<T>& sums, bf16* memory, i64 m, i64 n, const LEFT& left, const RIGHT& right, i32 depth) {
    Term<LEFT, RIGHT> terms[1] = {{left, right, depth}};
    multiply_tile<T, LEFT_COLUMNS, RIGHT_COLUMNS>(sums, memory, m, n, terms, Term<LEFT, DenseRight>{left, DenseRight{{nullptr, 0, 0}}, 0});
}

// ---- results -------------------------------------------------------------------------------------------------------

// Writes the finished tile to shared memory, row by row.
template <class T>
DEVICE f32* finish(const Sums<T>& sums, u8* memory) {
    f32* result = reinterpret_cast<f32*>(memory);
    i32 m = warp_index() / T::WARPS_N * T::WARP_M + lane_index() / 4;
    i32 n = warp_index() % T::WARPS_N * T::WARP_N + lane_index() % 4 * 2;
#pragma unroll
    for (i32 row = 0; row < T::ROWS; row++) {
#pragma unroll
        for (i32 column = 0; column < T::COLUMNS; column++) {
            const f32(&sum)[4] = sums.at[row][column];
            f32* to = result + (m + 16 * row) * T::PITCH + n + 8 * column;
            to[0] = sum[0], to[1] = sum[1];
            to[8 * T::PITCH] = sum[2], to[8 * T::PITCH + 1] = sum[3];
        }
    }
    __syncthreads();
    return result;
}

// Gives `store` every run of eight columns of the finished tile: its row and first column within the tile, and the values. All
// threads call it; `memory` is the ring's.
template <class T, class STORE>
DEVICE void for_each_pack(const Sums<T>& sums, u8* memory, STORE store) {
    const f32* result = finish<T>(sums, memory);
    constexpr i32 PACKS = T::N / PACK;
    for (i32 i = i32(threadIdx.x); i < T::M * PACKS; i += T::THREADS) {
        Pack pack;
        load_wide(pack, result + i / PACKS * T::PITCH + i % PACKS * PACK);
        store(i / PACKS, i % PACKS * PACK, pack);
    }
}

// The same for a tile whose halves belong together: `store` gets the packs at a column of the first half and of the second.
template <class T, class STORE>
DEVICE void for_each_pair(const Sums<T>& sums, u8* memory, STORE store) {
    const f32* result = finish<T>(sums, memory);
    constexpr i32 HALF = T::N / 2, PACKS = HALF / PACK;
    for (i32 i = i32(threadIdx.x); i < T::M * PACKS; i += T::THREADS) {
        Pack first, second;
        const f32* at = result + i / PACKS * T::PITCH + i % PACKS * PACK;
        load_wide(first, at), load_wide(second, at + HALF);
        store(i / PACKS, i % PACKS * PACK, first, second);
    }
}
