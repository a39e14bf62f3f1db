// Products in f32: the reference precision. Factors enter as they are; frozen weights are widened exactly.
//
//   product_exact   sum [M, N] = Σ_k left(m, k) · W(n, k) + Σ_r left2(m, r) · right2(n, r)
//                   out = scale · sum + bias (+ out);   copy = copy_scale · out; either may be left out
//
// Tensors: left, left2, right2 f32; W f32, bf16, f16 or NF4. Every factor has a stride for its row or column and one for its depth,
// so one kernel does y = x Wᵀ, dx = dy W, and the gradients of adapters, dA = vᵀ x and dB = s dyᵀ u.
//
// Bytes: as for matmul.cu with 4 bytes an activation. Limited by arithmetic: there are no tensor cores for f32.
//
// Decomposition: a block of 256 threads does a tile of 64 × 64, 16 deep at a time through shared memory; a thread 4 × 4 sums.
//
// Numerics: each sum is one chain of fused multiply-adds over k in rising order, then over r: it depends on nothing but the
// depth, so a row's result does not depend on the rows beside it.

#include "factor.cuh"

constexpr i32 THREADS = 256;
constexpr i32 TILE = 64;
constexpr i32 DEPTH = 16;
constexpr i32 PITCH = TILE + 4;  // rows 4 apart in banks

// 64 × 16 elements of a factor to shared memory, depth outermost there. Neighbouring threads read neighbouring memory.
template <class W>
DEVICE void load_tile(f32* tile, const Factor<W>& factor, i64 first, i64 depth, i64 end) {
#pragma unroll
    for (i32 i = i32(threadIdx.x); i < TILE * DEPTH; i += THREADS) {
        i32 index = factor.deep == 1 ? i / DEPTH : i % TILE, k = factor.deep == 1 ? i % DEPTH : i / TILE;
        tile[k * PITCH + index] = depth + k < end ? factor.at(first + index, depth + k) : 0.0f;
    }
}

template <class W>
DEVICE void add_product(f32 (&sum)[4][4], f32* left_tile, f32* right_tile, const Factor<f32>& left, const Factor<W>& right,
                        i64 m, i64 n, i64 depth) {
    i32 row = i32(threadIdx.x) / 16 * 4, column = i32(threadIdx.x) % 16;
    for (i64 k = 0; k < depth; k += DEPTH) {
        __syncthreads();
        load_tile(left_tile, left, m, k, depth);
        load_tile(right_tile, right, n, k, depth);
        __syncthreads();
#pragma unroll
        for (i32 step = 0; step < DEPTH; step++) {
#pragma unroll
            for (i32 i = 0; i < 4; i++) {
#pragma unroll
                for (i32 j = 0; j < 4; j++)
                    sum[i][j] = __fmaf_rn(left_tile[step * PITCH + row + i], right_tile[step * PITCH + column + 16 * j], sum[i][j]);
            }
        }
    }
}

template <class W, class OUT>
DEVICE void product(Factor<f32> left, Factor<W> right, i32 depth, Factor<f32> left2, Factor<f32> right2, i32 depth2,
                    const f32* bias_f32, const bf16* bias_bf16, OUT* out, f32 scale, f32* copy, f32 copy_scale,
                    i32 accumulate) {
    SHARED(f32, left_tile, DEPTH * PITCH);
    SHARED(f32, right_tile, DEPTH * PITCH);
    i64 m = i64(blockIdx.x) * TILE, n = i64(blockIdx.y) * TILE;
    f32 sum[4][4] = {};
    add_product(sum, left_tile, right_tile, left, right, m, n, depth);
    add_product(sum, left_tile, right_tile, left2, right2, m, n, depth2);
#pragma unroll
    for (i32 i = 0; i < 4; i++) {
#pragma unroll
        for (i32 j = 0; j < 4; j++) {
            i64 row = m + i32(threadIdx.x) / 16 * 4 + i, column = n + i32(threadIdx.x) % 16 + 16 * j;
            if (row >= left.count || column >= right.count) continue;
            f32 value = scale * sum[i][j];
            if (bias_f32 != nullptr) value += bias_f32[column];
            if (bias_bf16 != nullptr) value += to_f32(bias_bf16[column]);
            i64 place = row * right.count + column;
            if (accumulate) value += to_f32(out[place]);
            if (out != nullptr) out[place] = from_f32<OUT>(value);
            if (copy != nullptr) copy[place] = copy_scale * value;
        }
    }
}

#define PRODUCT(W, OUT)                                                                                                      \
    ENTRY(THREADS, 2)                                                                                                        \
    product_exact_##W##_##OUT(                                                                                               \
        const f32* __restrict__ left, i64 left_stride, i64 left_deep, const W* __restrict__ weight,                          \
        const f32* __restrict__ absmax, const u8* __restrict__ nested_codes, const f32* __restrict__ nested_map, f32 offset, \
        i64 weight_stride, i64 weight_deep, const f32* __restrict__ left2, const f32* __restrict__ right2,                   \
        i64 right2_stride, i64 right2_deep, const f32* __restrict__ bias_f32, const bf16* __restrict__ bias_bf16,            \
        OUT* __restrict__ out, f32 scale, f32* __restrict__ copy, f32 copy_scale, i64 rows, i64 columns, i32 depth,          \
        i32 depth2, i32 accumulate) {                                                                                        \
        Nf4Scales scales{absmax, nested_codes, nested_map, offset}, none{nullptr, nullptr, nullptr, 0.0f};                   \
        product<W, OUT>({left, none, rows, left_stride, left_deep}, {weight, scales, columns, weight_stride, weight_deep},   \
                        depth, {left2, none, rows, depth2, 1}, {right2, none, columns, right2_stride, right2_deep}, depth2,  \
                        bias_f32, bias_bf16, out, scale, copy, copy_scale, accumulate);                                      \
    }
PRODUCT(f32, f32)
PRODUCT(f32, bf16)
PRODUCT(bf16, f32)
PRODUCT(bf16, bf16)
PRODUCT(f16, f32)
PRODUCT(f16, bf16)
PRODUCT(u8, f32)
PRODUCT(u8, bf16)
