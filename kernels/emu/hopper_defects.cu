// One product of a warp group, C [64, 64] = A [64, 64] · B [64, 64]ᵀ, with one mistake each that the emulation must find, and without.
//
// Factors come by the copy engine; C's sums are stored as they lie in registers.

#include "hopper.cuh"

constexpr i32 THREADS = WARP_GROUP;
constexpr i32 TWO_GROUPS = 256;
constexpr i32 SIDE = 64;
constexpr i32 TILE_BYTES = SIDE * SIDE * 2;

enum Mistake {
    NOTHING,
    NOT_WAITED_FOR_BOX,
    WRONG_PARITY,
    NOT_EXPECTED,
    TOO_MUCH_EXPECTED,
    TOO_MANY_ARRIVALS,
    NOT_PUBLISHED,
    NO_FENCE,
    NOT_WAITED_FOR_PRODUCTS,
    NOT_COMMITTED,
    SUMS_TOUCHED,
    REGISTERS_TOUCHED,
    OVERWRITTEN,
    NOT_SHOWN,
    WRONG_STRIDE,
    DIFFERENT_PRODUCTS,
    REGISTERS_CHANGED,
    SUMS_NOT_BEGUN,
    WRONG_ACROSS,
};

DEVICE void store(f32* c, const f32 (&sum)[SIDE / 2]) {
    i32 row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
    for (i32 i = 0; i < SIDE / 2; i++) c[(row + i / 2 % 2 * 8) * SIDE + i / 4 * 8 + column + i % 2] = sum[i];
}

// The left factor of 16 of the depth, from global memory.
DEVICE void load_left(u32 (&a)[4], const bf16* left, i32 k) {
    i32 row = warp_index() * 16 + lane_index() / 4, column = k + lane_index() % 4 * 2;
    for (i32 i = 0; i < 4; i++)
        a[i] = *reinterpret_cast<const u32*>(left + (row + i % 2 * 8) * SIDE + column + i / 2 * 8);
}

template <Mistake MISTAKE>
DEVICE void product(const TensorMap* a, const TensorMap* b, const bf16* left, f32* c, bool in_registers, bool transposed) {
    DYNAMIC_SHARED(memory);
    u8* right = memory + TILE_BYTES;
    u64* barrier = reinterpret_cast<u64*>(memory + 2 * TILE_BYTES);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        if (MISTAKE != NOT_PUBLISHED) barriers_publish();
        u32 bytes = 2 * TILE_BYTES + (MISTAKE == TOO_MUCH_EXPECTED ? 16 : 0);
        if (MISTAKE != NOT_EXPECTED) barrier_expect(barrier, bytes);
        copy_box(memory, a, 0, 0, 0, barrier);
        copy_box(right, b, 0, 0, 0, barrier);
        barrier_arrive(barrier);
        if (MISTAKE == TOO_MANY_ARRIVALS) barrier_arrive(barrier);
    }
    __syncthreads();
    if (MISTAKE != NOT_WAITED_FOR_BOX) barrier_wait(barrier, MISTAKE == WRONG_PARITY ? 1 : 0);
    if (MISTAKE == NOT_SHOWN) {
        // The same elements once more, by ordinary stores.
        u32* words = reinterpret_cast<u32*>(right);
        for (i32 i = i32(threadIdx.x); i < TILE_BYTES / 4; i += THREADS) words[i] = words[i] + 0x10001;
        __syncthreads();
    }
    f32 sum[SIDE / 2] = {};
    u32 registers[4][4];
    i32 stride = MISTAKE == WRONG_STRIDE ? SWIZZLE_REPEAT / 2 : SWIZZLE_REPEAT;
    for (i32 step = 0; step < 4; step++) {
        load_left(registers[step], left, 16 * step);
        if (MISTAKE != NO_FENCE) products_begin();
        u64 of_b = factor(right + 32 * step, stride);
        if (MISTAKE == DIFFERENT_PRODUCTS && warp_index() == 3) of_b = factor(right, stride);
        if (in_registers) {
            multiply_async(sum, registers[step], of_b);
        } else if (transposed) {
            multiply_async<true>(sum, factor(memory + 2048 * step, SWIZZLE_REPEAT), of_b);
        } else {
            multiply_async<false>(sum, factor(memory + 32 * step, SWIZZLE_REPEAT), of_b);
        }
        if (MISTAKE == REGISTERS_TOUCHED) registers[step][2] ^= 1;
        if (MISTAKE != NOT_COMMITTED) products_commit();
    }
    if (MISTAKE == OVERWRITTEN && threadIdx.x == 0) {
        barrier_expect(barrier, TILE_BYTES);
        copy_box(right, b, 0, 0, 0, barrier);
        barrier_arrive(barrier);
    }
    if (MISTAKE == SUMS_TOUCHED) sum[3] = 1.0f;
    if (MISTAKE != NOT_WAITED_FOR_PRODUCTS) products_wait<0>();
    pin(sum);
    store(c, sum);
    if (MISTAKE == OVERWRITTEN) barrier_wait(barrier, 1);
    if (MISTAKE == NOT_WAITED_FOR_BOX || MISTAKE == WRONG_PARITY) barrier_wait(barrier, 0);
}

#define PRODUCT(name, MISTAKE)                                                                              \
    ENTRY(THREADS) name(MAP a, MAP b, const bf16* __restrict__ left, f32* __restrict__ c, i32 in_registers, i32 transposed) { \
        product<MISTAKE>(&a, &b, left, c, in_registers, transposed);                                        \
    }
PRODUCT(group_product, NOTHING)
PRODUCT(box_not_waited_for, NOT_WAITED_FOR_BOX)
PRODUCT(wrong_parity, WRONG_PARITY)
PRODUCT(bytes_not_expected, NOT_EXPECTED)
PRODUCT(too_much_expected, TOO_MUCH_EXPECTED)
PRODUCT(too_many_arrivals, TOO_MANY_ARRIVALS)
PRODUCT(barrier_not_published, NOT_PUBLISHED)
PRODUCT(product_without_fence, NO_FENCE)
PRODUCT(products_not_waited_for, NOT_WAITED_FOR_PRODUCTS)
PRODUCT(products_not_committed, NOT_COMMITTED)
PRODUCT(sums_touched, SUMS_TOUCHED)
PRODUCT(registers_touched, REGISTERS_TOUCHED)
PRODUCT(factor_overwritten, OVERWRITTEN)
PRODUCT(factor_not_shown, NOT_SHOWN)
PRODUCT(wrong_stride, WRONG_STRIDE)
PRODUCT(different_products, DIFFERENT_PRODUCTS)

// C [64, 128] = A [64, 64] · B [64, 128]: B's rows are the depth, 64 elements of them in one box and the others in the next. With A in
// shared memory the first product begins the sums, which are NaN before; with A in registers, one fence is for all of them.
template <Mistake MISTAKE>
DEVICE void wide_product(const TensorMap* a, const TensorMap* b, const bf16* left, f32* c, bool in_registers) {
    constexpr i32 COLUMNS = 2 * SIDE;
    DYNAMIC_SHARED(memory);
    u8* right = memory + TILE_BYTES;
    u64* barrier = reinterpret_cast<u64*>(memory + 3 * TILE_BYTES);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barriers_publish();
        barrier_expect(barrier, 3 * TILE_BYTES);
        copy_box(memory, a, 0, 0, 0, barrier);
        copy_box(right, b, 0, 0, 0, barrier);
        copy_box(right + TILE_BYTES, b, SIDE, 0, 0, barrier);
        barrier_arrive(barrier);
    }
    __syncthreads();
    barrier_wait(barrier, 0);
    u64 of_b = factor(right, SWIZZLE_REPEAT, MISTAKE == WRONG_ACROSS ? TILE_BYTES / 2 : TILE_BYTES);
    u32 registers[4][4];
    f32 sum[COLUMNS / 2];
    for (i32 i = 0; i < COLUMNS / 2; i++) sum[i] = in_registers ? 0.0f : __uint_as_float(F32_NAN_BITS);
    for (i32 step = 0; step < 4; step++) load_left(registers[step], left, 16 * step);
    products_begin(registers);
    if (MISTAKE == REGISTERS_CHANGED) registers[3][1] ^= 1;
    for (i32 step = 0; step < 4; step++) {
        u64 rows = moved(of_b, 2048 * step);
        if (in_registers) {
            multiply_async_transposed(sum, registers[step], rows);
        } else {
            multiply_async<false, true>(sum, factor(memory + 32 * step, SWIZZLE_REPEAT), rows,
                                        MISTAKE == SUMS_NOT_BEGUN || step > 0);
        }
    }
    products_commit();
    products_wait<0>();
    pin(sum);
    i32 row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
    for (i32 i = 0; i < COLUMNS / 2; i++) c[(row + i / 2 % 2 * 8) * COLUMNS + i / 4 * 8 + column + i % 2] = sum[i];
}

#define WIDE_PRODUCT(name, MISTAKE)                                                                                \
    ENTRY(THREADS) name(MAP a, MAP b, const bf16* __restrict__ left, f32* __restrict__ c, i32 in_registers) {      \
        wide_product<MISTAKE>(&a, &b, left, c, in_registers);                                                      \
    }
WIDE_PRODUCT(wide_group_product, NOTHING)
WIDE_PRODUCT(registers_changed, REGISTERS_CHANGED)
WIDE_PRODUCT(sums_not_begun, SUMS_NOT_BEGUN)
WIDE_PRODUCT(wrong_across, WRONG_ACROSS)

enum Meeting { MET, NOT_MET, MET_ALONE, NOT_LEFT };

// Two groups write half a piece each and read the other's, piece after piece, as they hand each other finished sums.
template <Meeting MEETING>
DEVICE void meeting(f32* out, i32 pieces) {
    DYNAMIC_SHARED(memory);
    f32* staging = reinterpret_cast<f32*>(memory);
    i32 thread = i32(threadIdx.x), group = thread / WARP_GROUP;
    for (i32 piece = 0; piece < pieces; piece++) {
        if (MEETING != NOT_LEFT) numbered_barrier(1, TWO_GROUPS);
        staging[thread] = f32(1000 * piece + thread);
        if (MEETING == MET_ALONE) numbered_barrier(2 + group, WARP_GROUP);
        if (MEETING == MET || MEETING == NOT_LEFT) numbered_barrier(1, TWO_GROUPS);
        out[piece * TWO_GROUPS + thread] = staging[TWO_GROUPS - 1 - thread];
    }
}

#define MEETING(name, MISTAKE) \
    ENTRY(TWO_GROUPS) name(f32* __restrict__ out, i32 pieces) { meeting<MISTAKE>(out, pieces); }
MEETING(groups_meet, MET)
MEETING(groups_do_not_meet, NOT_MET)
MEETING(groups_meet_alone, MET_ALONE)
MEETING(groups_leave_too_early, NOT_LEFT)

// Boxes at (x, y) of a map, as they lie in shared memory, 64 rows of 128 bytes.
ENTRY(THREADS) box(MAP map, u8* __restrict__ out, i32 x, i32 y, i32 bytes) {
    DYNAMIC_SHARED(memory);
    u64* barrier = reinterpret_cast<u64*>(memory + TILE_BYTES);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barriers_publish();
        barrier_expect(barrier, u32(bytes));
        copy_box(memory, &map, x, y, 0, barrier);
        barrier_arrive(barrier);
    }
    __syncthreads();
    barrier_wait(barrier, 0);
    for (i32 i = i32(threadIdx.x); i < bytes; i += THREADS) out[i] = memory[i];
}
