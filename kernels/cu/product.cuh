// C [64 × N] += A [64 × depth] · B [depth × N], by a block of 256 threads, from whatever two functions return.
//
// The factors come element by element from functions of an index (a row of A, a column of B) and a depth, so a factor may be
// gathered, transposed, scaled or masked on its way, and may lie in global or in shared memory; functions return 0 beyond their
// matrix. Where elements lie next to each other in memory is said by ALONG: along the depth, or across it. Factors are fetched in
// steps of 32 of the depth, into tiles in shared memory that all threads read.
//
// Factor is the type in which factors enter the product. f32: a thread sums 4 × N/16 elements by fused multiply-adds. bf16:
// factors are rounded to nearest even and a warp multiplies 16 × N/2 on the tensor cores, m16n8k16; four warps down, two
// across. Tiles are then kept with the depth innermost for both factors, in rows of 40 elements (80 bytes), so that the eight
// rows that `load_matrices` reads at once lie in different banks. Sums are f32; each element's terms are added in the order of the
// depth, whatever the block.
//
// Shared memory: `stage`, PRODUCT_STAGE<N> floats (PRODUCT_STAGE_OF where the type is known), aligned to 16 bytes; free again at the next barrier after `add`.

#pragma once
#include "common.cuh"

constexpr i32 PRODUCT_THREADS = 256;
constexpr i32 PRODUCT_ROWS = 64;
constexpr i32 PRODUCT_STEP = 32;
// Rows of the f32 tiles are one element longer than they need be, so that a column's elements lie in different banks.
constexpr i32 PRODUCT_SINGLE_ROW = PRODUCT_STEP + 1;
constexpr i32 PRODUCT_HALF_ROW = PRODUCT_STEP + 8;

template <i32 N>
constexpr i32 PRODUCT_STAGE = (PRODUCT_ROWS + N) * PRODUCT_SINGLE_ROW;

enum Along { ALONG_DEPTH, ACROSS };

template <class Factor>
constexpr bool ON_TENSOR_CORES = false;
template <>
constexpr bool ON_TENSOR_CORES<bf16> = true;

// Whether a factor's type has `packed()`, that its rows can be read eight elements at a time, and `pack(row, first)`, which reads
// them as they lie. Such a factor goes to shared memory by 16 bytes.
template <class Load>
constexpr bool HAS_PACKS = false;

// Index `row` of the other extent and `depth` of element `i` of a tile of `rows` × `steps`, in the order of memory.
template <Along ALONG>
DEVICE void tile_place(i32 i, i32 rows, i32 steps, i32& row, i32& depth) {
    if constexpr (ALONG == ALONG_DEPTH) {
        row = i / steps, depth = i % steps;
    } else {
        row = i % rows, depth = i / rows;
    }
}

// What a product of one type of factors needs of PRODUCT_STAGE<N>, in floats.
template <class Factor, i32 N>
constexpr i32 PRODUCT_STAGE_OF =
    ON_TENSOR_CORES<Factor> ? (PRODUCT_ROWS + N) * PRODUCT_HALF_ROW / 2 : PRODUCT_STAGE<N>;

template <class Factor, i32 N>
struct Product {
    static constexpr i32 PARTS = N / 16;
    // f32: four rows of a column in each part; bf16: an 16 × 8 tile's elements of this lane.
    f32 at[PARTS][4];

    DEVICE void clear() {
#pragma unroll
        for (i32 part = 0; part < PARTS; part++)
#pragma unroll
            for (i32 i = 0; i < 4; i++) at[part][i] = 0.0f;
    }

    // C += factor · other.
    DEVICE void add_scaled(const Product& other, f32 factor) {
#pragma unroll
        for (i32 part = 0; part < PARTS; part++)
#pragma unroll
            for (i32 i = 0; i < 4; i++) at[part][i] += factor * other.at[part][i];
    }

    // Calls `visit(row, column, value)` for the elements of this thread, the same ones for every product of these types.
    template <class Visit>
    DEVICE void each(Visit visit) {
#pragma unroll
        for (i32 part = 0; part < PARTS; part++)
#pragma unroll
            for (i32 i = 0; i < 4; i++) {
                if constexpr (ON_TENSOR_CORES<Factor>) {
                    i32 row = (warp_index() % 4) * 16 + lane_index() / 4 + (i & 2) * 4;
                    i32 column = (warp_index() / 4) * (N / 2) + part * 8 + lane_index() % 4 * 2 + (i & 1);
                    visit(row, column, at[part][i]);
                } else {
                    visit(i32(threadIdx.x) / 16 * 4 + i, i32(threadIdx.x) % 16 + part * 16, at[part][i]);
                }
            }
    }

    // C += A B. All threads of the block call it.
    template <Along ALONG_A, Along ALONG_B, class LoadA, class LoadB>
    DEVICE void add(f32* stage, i32 depth, LoadA a, LoadB b) {
        for (i32 first = 0; first < depth; first += PRODUCT_STEP) {
            __syncthreads();  // the tiles' readers, and the writers of what the functions read, are done
            if constexpr (ON_TENSOR_CORES<Factor>) {
                u32* tile = reinterpret_cast<u32*>(stage);
                fill_halves<ALONG_A, PRODUCT_ROWS>(tile, first, depth, a);
                fill_halves<ALONG_B, N>(tile + PRODUCT_ROWS * PRODUCT_HALF_ROW / 2, first, depth, b);
                __syncthreads();
                multiply_halves(tile);
            } else {
                fill_singles<ALONG_A, PRODUCT_ROWS>(stage, first, depth, a);
                fill_singles<ALONG_B, N>(stage + PRODUCT_ROWS * PRODUCT_SINGLE_ROW, first, depth, b);
                __syncthreads();
                multiply_singles(stage);
            }
        }
    }

   private:
    template <Along ALONG, i32 ROWS, class Load>
    DEVICE static void fill_singles(f32* tile, i32 first, i32 depth, Load load) {
#pragma unroll 4
        for (i32 i = i32(threadIdx.x); i < ROWS * PRODUCT_STEP; i += PRODUCT_THREADS) {
            i32 row, k;
            tile_place<ALONG>(i, ROWS, PRODUCT_STEP, row, k);
            tile[row * PRODUCT_SINGLE_ROW + k] = first + k < depth ? load(row, first + k) : 0.0f;
        }
    }

    // As above, two neighbours of the depth at a time, or eight.
    template <Along ALONG, i32 ROWS, class Load>
    DEVICE static void fill_halves(u32* tile, i32 first, i32 depth, Load load) {
        if constexpr (HAS_PACKS<Load> && ALONG == ALONG_DEPTH) {
            if (load.packed()) {
                constexpr i32 CHUNKS = PRODUCT_STEP / PACK;
#pragma unroll
                for (i32 i = i32(threadIdx.x); i < ROWS * CHUNKS; i += PRODUCT_THREADS) {
                    i32 row = i / CHUNKS, chunk = i % CHUNKS;
                    *reinterpret_cast<uint4*>(tile + (row * PRODUCT_HALF_ROW + chunk * PACK) / 2) =
                        load.pack(row, first + chunk * PACK);
                }
                return;
            }
        }
#pragma unroll 4
        for (i32 i = i32(threadIdx.x); i < ROWS * PRODUCT_STEP / 2; i += PRODUCT_THREADS) {
            i32 row, pair;
            tile_place<ALONG>(i, ROWS, PRODUCT_STEP / 2, row, pair);
            i32 k = first + 2 * pair;
            f32 low = k < depth ? load(row, k) : 0.0f;
            f32 high = k + 1 < depth ? load(row, k + 1) : 0.0f;
            tile[row * (PRODUCT_HALF_ROW / 2) + pair] = bf16_pair(low, high);
        }
    }

    DEVICE void multiply_singles(const f32* stage) {
        const f32* a = stage + i32(threadIdx.x) / 16 * 4 * PRODUCT_SINGLE_ROW;
        const f32* b = stage + (PRODUCT_ROWS + i32(threadIdx.x) % 16) * PRODUCT_SINGLE_ROW;
#pragma unroll 8
        for (i32 k = 0; k < PRODUCT_STEP; k++) {
            f32 of_a[4];
#pragma unroll
            for (i32 i = 0; i < 4; i++) of_a[i] = a[i * PRODUCT_SINGLE_ROW + k];
#pragma unroll
            for (i32 part = 0; part < PARTS; part++) {
                f32 of_b = b[part * 16 * PRODUCT_SINGLE_ROW + k];
#pragma unroll
                for (i32 i = 0; i < 4; i++) at[part][i] += of_a[i] * of_b;
            }
        }
    }

    DEVICE void multiply_halves(const u32* tile) {
        const bf16* a = reinterpret_cast<const bf16*>(tile) + (warp_index() % 4) * 16 * PRODUCT_HALF_ROW;
        const bf16* b = reinterpret_cast<const bf16*>(tile) + (PRODUCT_ROWS + warp_index() / 4 * (N / 2)) * PRODUCT_HALF_ROW;
        i32 matrix = lane_index() / 8, row = lane_index() % 8;
#pragma unroll
        for (i32 k = 0; k < PRODUCT_STEP; k += 16) {
            u32 of_a[4];
            load_matrices(of_a, a + (matrix % 2 * 8 + row) * PRODUCT_HALF_ROW + k + matrix / 2 * 8);
#pragma unroll
            for (i32 part = 0; part < PARTS; part += 2) {
                // The columns of this part and the next, each for the first and the second half of the depth.
                u32 of_b[4];
                load_matrices(of_b, b + (8 * part + matrix / 2 * 8 + row) * PRODUCT_HALF_ROW + k + matrix % 2 * 8);
                u32 left[2] = {of_b[0], of_b[1]}, right[2] = {of_b[2], of_b[3]};
                multiply_add(at[part], of_a, left);
                multiply_add(at[part + 1], of_a, right);
            }
        }
    }
};
