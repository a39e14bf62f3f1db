// What the kernels of the gated delta rule share: where a chunk's rows lie, and its gates. The formulas are in `gated_delta.cu`.

#pragma once
#include "product.cuh"

constexpr i32 CHUNK = 64;

struct Heads {
    i32 key_heads, value_heads, key_dim, value_dim;

    DEVICE i32 key_head(i32 head) const { return i32(i64(head) * key_heads / value_heads); }
};

// Rows `first..first + count` of one head of a tensor [T, heads, width]; 0 beyond them.
template <class T>
struct HeadRows {
    T* at;
    i64 stride;
    i32 count, width;

    DEVICE HeadRows(T* tensor, i64 first, i32 rows, i32 heads, i32 head, i32 columns)
        : at(tensor + (first * heads + head) * columns), stride(i64(heads) * columns), count(rows), width(columns) {}
    DEVICE bool has(i32 row, i32 column) const { return row < count && column < width; }
    DEVICE f32 get(i32 row, i32 column) const { return has(row, column) ? to_f32(at[row * stride + column]) : 0.0f; }
    // As a factor of a product whose depth runs along the rows.
    DEVICE f32 operator()(i32 row, i32 column) const { return get(row, column); }
    DEVICE bool packed() const { return width % PACK == 0; }
    DEVICE uint4 pack(i32 row, i32 column) const {
        if (!has(row, column)) return make_uint4(0, 0, 0, 0);
        return *reinterpret_cast<const uint4*>(at + row * stride + column);
    }
    template <class V>
    DEVICE void set(i32 row, i32 column, V value) const {
        if (has(row, column)) at[row * stride + column] = value;
    }
};

template <>
constexpr bool HAS_PACKS<HeadRows<const bf16>> = true;

// Decays and strengths of a chunk, in shared memory; 0 beyond its rows.
struct Gates {
    static constexpr i32 FLOATS = 5 * CHUNK;
    f32 *high, *low, *beta, *from_start, *to_end;

    DEVICE explicit Gates(f32* memory)
        : high(memory), low(memory + CHUNK), beta(memory + 2 * CHUNK), from_start(memory + 3 * CHUNK),
          to_end(memory + 4 * CHUNK) {}

    // What a thread reads of a chunk's gates, before it is needed.
    struct Own {
        f32 decay, strength;
    };
    static DEVICE Own fetch(const f32* decay, const f32* strength, i64 first, i32 rows, i32 heads, i32 head) {
        i32 i = i32(threadIdx.x);
        if (i >= rows) return {0.0f, 0.0f};
        i64 at = (first + i) * heads + head;
        return {decay[at], strength[at]};
    }

    // All threads call it; its results are there for all behind the barrier it ends with, as are those of copies that each thread
    // has waited for. Two warps sum 32 rows each, and the second one adds what the first one has.
    DEVICE void set(Own own, i32 rows) {
        i32 i = i32(threadIdx.x);
        f64 through = f64(own.decay);
        if (i < CHUNK) {
#pragma unroll
            for (i32 step = 1; step < WARP_LANES; step *= 2) {
                f64 below = from_lane_below(through, step);
                if (lane_index() >= step) through += below;
            }
        }
        __syncthreads();  // the last chunk's readers are done
        f64* halves = reinterpret_cast<f64*>(high);
        if (i < CHUNK && lane_index() == WARP_LANES - 1) halves[warp_index()] = through;
        __syncthreads();
        f64 first = halves[0], whole = first + halves[1];
        __syncthreads();
        if (i < CHUNK) {
            if (i >= WARP_LANES) through += first;
            high[i] = f32(through);
            low[i] = f32(through - f64(high[i]));
            beta[i] = own.strength;
            from_start[i] = i < rows ? expf(f32(through)) : 0.0f;
            to_end[i] = i < rows ? expf(f32(whole - through)) : 0.0f;
        }
        __syncthreads();
    }
    DEVICE void load(const f32* decay, const f32* strength, i64 first, i32 rows, i32 heads, i32 head) {
        set(fetch(decay, strength, first, rows, heads, head), rows);
    }
    // e^{c_i − c_j} for j ≤ i.
    DEVICE f32 between(i32 i, i32 j) const { return expf((high[i] - high[j]) + (low[i] - low[j])); }
};
