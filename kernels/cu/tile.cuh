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
// Any extents: chunks beyond a matrix are filled with zeros and not read; matrices whose rows do not begin at 16-byte
// boundaries are read element by element, but for 4-bit ones, which the host decodes beforehand.

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

// How many of `most` things from `first` on there are, of `count`.
DEVICE i32 how_many(i64 first, i64 count, i32 most) {
    i64 left = count - first;
    return left <= 0 ? 0 : left < most ? i32(left) : most;
}

// Where rows `first` to `first + here` of a matrix begin, `here` at most HEIGHT. The general form asks the matrix for each row;
// rows that lie one after another are found from the first.
template <class MATRIX, i32 HEIGHT>
struct RowFinder {
    const MATRIX& matrix;
    i64 first;

    DEVICE RowFinder(const MATRIX& matrix, i64 first) : matrix(matrix), first(first) {}
    DEVICE bool find(i32 within, const bf16*& row) const {
        const bf16* found = matrix.row(first + within);
        row = found == nullptr ? matrix.values : found;
        return found != nullptr;
    }
};

template <i32 HEIGHT>
struct RowFinder<Rows, HEIGHT> {
    const bf16* base;
    i32 here, width;

    DEVICE RowFinder(const Rows& matrix, i64 first) {
        here = how_many(first, matrix.count, HEIGHT);
        base = matrix.values + (here > 0 ? first * matrix.width : 0);
        width = i32(matrix.width);
    }
    DEVICE bool find(i32 within, const bf16*& row) const {
        bool exists = within < here;
        row = base + i64(exists ? within : 0) * width;
        return exists;
    }
};

// Begins to copy HEIGHT rows of WIDTH elements from (`row`, `column`) of a matrix to a swizzled tile; zeros where the matrix has
// none. MATRIX has `values`, `width` (less than 2³¹) and `row`, as `Rows` has.
template <i32 HEIGHT, i32 WIDTH, i32 THREADS, class MATRIX>
DEVICE void copy_rectangle(bf16* tile, const MATRIX& matrix, i64 row, i64 column) {
    constexpr i32 CHUNKS = WIDTH / PACK;
    static_assert(HEIGHT * CHUNKS % THREADS == 0 && THREADS % CHUNKS == 0, "every thread copies as many chunks, in one column");
    i32 first = i32(threadIdx.x) / CHUNKS, chunk = i32(threadIdx.x) % CHUNKS;
    column += chunk * PACK;
    i32 count = how_many(column, matrix.width, PACK);
    if (count == 0) column = 0;
    RowFinder<MATRIX, HEIGHT> finder(matrix, row);
    if (matrix.width % PACK == 0) {
#pragma unroll
        for (i32 i = 0; i < HEIGHT * CHUNKS / THREADS; i++) {
            i32 within = first + i * (THREADS / CHUNKS);
            const bf16* from;
            bool exists = finder.find(within, from);
            copy_async(tile + swizzled<CHUNKS>(within, chunk) * PACK, from + column, exists ? 2 * count : 0);
        }
        return;
    }
    // Rows that do not begin at 16-byte boundaries, element by element.
#pragma unroll 1
    for (i32 within = first; within < HEIGHT; within += THREADS / CHUNKS) {
        const bf16* from;
        i32 here = finder.find(within, from) ? count : 0;
        u32 words[4] = {};
#pragma unroll
        for (i32 i = 0; i < PACK; i++)
            if (i < here) words[i / 2] |= u32(from[column + i].bits) << 16 * (i % 2);
        *reinterpret_cast<uint4*>(tile + swizzled<CHUNKS>(within, chunk) * PACK) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// ---- right factors -------------------------------------------------------------------------------------------------

// A right factor in bf16. All of its work is the copy.
struct DenseRight {
    Rows matrix;

    template <class T, bool COLUMNS>
    DEVICE void copy(bf16* tile, i64 first, i32 depth) const {
        if constexpr (COLUMNS) {
            copy_rectangle<T::K, T::N, T::THREADS>(tile, matrix, depth, first);
        } else {
            copy_rectangle<T::N, T::K, T::THREADS>(tile, matrix, first, depth);
        }
    }
    template <class T, bool COLUMNS>
    DEVICE void fetch(i64, i32) {}
    DEVICE void advance() {}
    template <class T, bool COLUMNS>
    DEVICE void decode(bf16*, i32) const {}
};

// A right factor in NF4, `count` rows of `width` elements, a multiple of 32. A thread decodes one or two runs of 32 elements of
// each tile, in rows some apart: 16 bytes of codes in one access, and one scale.
struct Nf4Right {
    static constexpr i32 RUN = 32;

    const u8* codes;
    Nf4Scales scales;
    i64 count, width;
    const f32* table;  // the sixteen values, in shared memory

    // Codes and scales of the tile to be decoded, and of the one after it.
    uint4 words[2], next_words[2];
    f32 scale[2], next_scale[2];

    // How this thread's runs lie in a tile: how many, in rows how far apart, beginning where.
    template <class T, bool COLUMNS>
    struct Runs {
        static constexpr i32 WIDTH = COLUMNS ? T::N : T::K;
        static constexpr i32 IN_ROW = WIDTH / RUN;
        static constexpr i32 COUNT = T::N * T::K / RUN / T::THREADS;
        static constexpr i32 APART = T::THREADS / IN_ROW;
        static_assert(COUNT == 1 || COUNT == 2, "a thread decodes 32 or 64 elements of a tile");
        static DEVICE i32 row(i32 run) { return i32(threadIdx.x) / IN_ROW + run * APART; }
        static DEVICE i32 column() { return i32(threadIdx.x) % IN_ROW * RUN; }
    };

    template <class T, bool COLUMNS>
    DEVICE void copy(bf16*, i64, i32) const {}

    // Reads this thread's codes and scales of a tile, to be decoded one step later.
    template <class T, bool COLUMNS>
    DEVICE void fetch(i64 first, i32 depth) {
        using Mine = Runs<T, COLUMNS>;
        i64 column = (COLUMNS ? first : i64(depth)) + Mine::column();
#pragma unroll
        for (i32 run = 0; run < Mine::COUNT; run++) {
            i64 row = (COLUMNS ? i64(depth) : first) + Mine::row(run);
            next_words[run] = make_uint4(0, 0, 0, 0);
            next_scale[run] = 0.0f;  // decodes to zeros
            if (row >= count || column >= width) continue;
            i64 element = row * width + column;
            next_words[run] = *reinterpret_cast<const uint4*>(codes + element / 2);
            next_scale[run] = scales.of(element / NF4_BLOCK);
        }
    }

    DEVICE void advance() {
#pragma unroll
        for (i32 run = 0; run < 2; run++) words[run] = next_words[run], scale[run] = next_scale[run];
    }

    // Decodes chunk `step` of four of each of this thread's runs into the tile.
    template <class T, bool COLUMNS>
    DEVICE void decode(bf16* tile, i32 step) const {
        using Mine = Runs<T, COLUMNS>;
#pragma unroll
        for (i32 run = 0; run < Mine::COUNT; run++) {
            const uint4& all = words[run];
            u32 word = step == 0 ? all.x : step == 1 ? all.y : step == 2 ? all.z : all.w, halves[4];
#pragma unroll
            for (i32 i = 0; i < 4; i++) halves[i] = bf16_pair(value(word, 8 * i + 4) * scale[run], value(word, 8 * i) * scale[run]);
            i32 chunk = Mine::column() / PACK + step;
            *reinterpret_cast<uint4*>(tile + swizzled<Mine::WIDTH / PACK>(Mine::row(run), chunk) * PACK) =
                make_uint4(halves[0], halves[1], halves[2], halves[3]);
        }
    }

    // The value of the code at a bit, whose place in the table, in bytes, takes one shift and one mask.
    DEVICE f32 value(u32 word, i32 bit) const {
        u32 place = (bit >= 2 ? word >> (bit - 2) : word << (2 - bit)) & 60;
        return *reinterpret_cast<const f32*>(reinterpret_cast<const u8*>(table) + place);
    }
};

// ---- fragments -----------------------------------------------------------------------------------------------------

// Rows `m .. m + 16`, depth `k .. k + 16` of the left tile.
template <class T, bool COLUMNS>
DEVICE void load_left(u32 (&a)[4], const bf16* tile, i32 m, i32 k) {
    i32 lane = lane_index();
    if constexpr (COLUMNS) {
        i32 row = k + lane / 16 * 8 + lane % 8, chunk = m / PACK + lane / 8 % 2;
        load_matrices_transposed(a, tile + swizzled<T::M / PACK>(row, chunk) * PACK);
    } else {
        load_matrices(a, tile + swizzled<T::K / PACK>(m + lane % 16, k / PACK + lane / 16) * PACK);
    }
}

// Depth `k .. k + 16` of columns `n .. n + 16` of the product: two fragments, in b[0], b[1] and b[2], b[3].
template <class T, bool COLUMNS>
DEVICE void load_right(u32 (&b)[4], const bf16* tile, i32 n, i32 k) {
    i32 lane = lane_index();
    if constexpr (COLUMNS) {
        i32 row = k + lane / 8 % 2 * 8 + lane % 8, chunk = n / PACK + lane / 16;
        load_matrices_transposed(b, tile + swizzled<T::N / PACK>(row, chunk) * PACK);
    } else {
        i32 row = n + lane / 16 * 8 + lane % 8, chunk = k / PACK + lane / 8 % 2;
        load_matrices(b, tile + swizzled<T::K / PACK>(row, chunk) * PACK);
    }
}

// One step of 16 in depth.
template <class T, bool LEFT_COLUMNS, bool RIGHT_COLUMNS>
DEVICE void multiply_step(Sums<T>& sums, const bf16* left, const bf16* right, i32 k) {
    i32 m = warp_index() / T::WARPS_N * T::WARP_M, n = warp_index() % T::WARPS_N * T::WARP_N;
    u32 a[T::ROWS][4], b[T::COLUMNS / 2][4];
#pragma unroll
    for (i32 row = 0; row < T::ROWS; row++) load_left<T, LEFT_COLUMNS>(a[row], left, m + 16 * row, k);
#pragma unroll
    for (i32 pair = 0; pair < T::COLUMNS / 2; pair++) load_right<T, RIGHT_COLUMNS>(b[pair], right, n + 16 * pair, k);
#pragma unroll
    for (i32 row = 0; row < T::ROWS; row++) {
#pragma unroll
        for (i32 column = 0; column < T::COLUMNS; column++) {
            u32 factor[2] = {b[column / 2][column % 2 * 2], b[column / 2][column % 2 * 2 + 1]};
            multiply_add(sums.at[row][column], a[row], factor);
        }
    }
}

// ---- the main loop -------------------------------------------------------------------------------------------------

// Adds left · right, and then left2 · right2 (a low-rank second term; none if its depth is 0), for the tile at (`m`, `n`).
// LEFT has `values`, `row` and `width` as `Rows` has: a gather is another such type. `memory` holds the ring.
template <class T, bool LEFT_COLUMNS, bool RIGHT_COLUMNS, class LEFT, class RIGHT>
DEVICE void multiply_tile(Sums<T>& sums, bf16* memory, i64 m, i64 n, const LEFT& left, RIGHT right, i32 depth,
                          const LEFT& left2, const DenseRight& right2, i32 depth2) {
    i32 first_tiles = (depth + T::K - 1) / T::K, tiles = first_tiles + (depth2 + T::K - 1) / T::K;
    auto stage = [&](i32 tile) { return memory + tile % T::STAGES * T::STAGE; };
    auto copy_left = [&](i32 tile, const LEFT& rows, i32 depth) {
        if constexpr (LEFT_COLUMNS) {
            copy_rectangle<T::K, T::M, T::THREADS>(stage(tile), rows, depth, m);
        } else {
            copy_rectangle<T::M, T::K, T::THREADS>(stage(tile), rows, m, depth);
        }
    };
    // Begins what is copied, of both factors of a tile.
    auto copy = [&](i32 tile) {
        if (tile < first_tiles) {
            copy_left(tile, left, tile * T::K);
            right.template copy<T, RIGHT_COLUMNS>(stage(tile) + T::LEFT, n, tile * T::K);
        } else {
            copy_left(tile, left2, (tile - first_tiles) * T::K);
            right2.template copy<T, RIGHT_COLUMNS>(stage(tile) + T::LEFT, n, (tile - first_tiles) * T::K);
        }
    };
    auto decode = [&](i32 tile, i32 step) {
        if (tile < first_tiles) right.template decode<T, RIGHT_COLUMNS>(stage(tile) + T::LEFT, step);
    };
    auto fetch = [&](i32 tile) {
        if (tile < first_tiles) right.template fetch<T, RIGHT_COLUMNS>(n, tile * T::K);
    };
    fetch(0);
    for (i32 tile = 0; tile < T::STAGES - 1; tile++) {
        right.advance();
        fetch(tile + 1);
        if (tile < tiles) {
            copy(tile);
#pragma unroll
            for (i32 step = 0; step < 4; step++) decode(tile, step);
        }
        copies_commit();
    }
    for (i32 tile = 0; tile < tiles; tile++) {
        copies_wait<T::STAGES - 2>();
        __syncthreads();  // this tile is whole, and the one before it is done with
        i32 ahead = tile + T::STAGES - 1;
        right.advance();
        fetch(ahead + 1);
        if (ahead < tiles) copy(ahead);
        copies_commit();
        const bf16* at = stage(tile);
#pragma unroll
        for (i32 step = 0; step < 4; step++) {
            multiply_step<T, LEFT_COLUMNS, RIGHT_COLUMNS>(sums, at, at + T::LEFT, step * 16);
            decode(ahead, step);
        }
    }
    copies_wait<0>();
    __syncthreads();  // the ring is free
}

// ---- results -------------------------------------------------------------------------------------------------------

// Gives `store` every run of eight columns of the finished tile: its row and first column within the tile, and the values. All
// threads call it; `memory` is the ring's.
template <class T, class STORE>
DEVICE void for_each_pack(const Sums<T>& sums, u8* memory, STORE store) {
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
    constexpr i32 PACKS = T::N / PACK;
    for (i32 i = i32(threadIdx.x); i < T::M * PACKS; i += T::THREADS) {
        Pack pack;
        load_wide(pack, result + i / PACKS * T::PITCH + i % PACKS * PACK);
        store(i / PACKS, i % PACKS * PACK, pack);
    }
}
