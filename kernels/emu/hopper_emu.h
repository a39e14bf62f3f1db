// Part of cuda_emu.cpp: what Hopper adds, as the PTX ISA defines it. Barriers that count bytes, the copy engine, products of warp
// groups.
//
// Everything asynchronous happens as late as it may, and destroys at once what it will overwrite:
//   - a box is NaN in shared memory from the copy's beginning on, and its bytes come when no thread of the block can go on otherwise;
//   - the sums of a product are NaN from its beginning on, and it reads shared memory when its group is waited for.
// So a missing wait shows as NaN, and a stage that is written while it is read too.
//
// wgmma and the copy engine see shared memory through their own eyes: a copy of it that ordinary stores reach only at
// `show_to_engines`. The fence shows every thread's stores, where a device would show its own thread's.
//
// Warps of a group do their products one by one here, each its own 16 rows, since nothing is exchanged between them; at the end of
// the block their products are compared.

namespace emu {

// A barrier of shared memory.
struct CountingBarrier {
    const void* address;
    unsigned count, missing;  // arrivals of a phase, and those not counted yet
    long long bytes;          // expected and not there yet; below zero while more came than were expected so far
    long long under_way;      // of copies to it
    unsigned phase;           // of those that have ended
    bool published;
    std::vector<Fiber*> waiting;
};

// The map of a tensor: words of `TensorMap`, as gpu/map.rs lists them for the emulation.
struct TensorWords {
    uint64_t base, extents[3], strides[2], box[3], element_bytes, swizzle_bytes, mark;
};
static_assert(sizeof(TensorWords) <= 128, "larger than a TensorMap");
constexpr uint64_t MAP_MARK = 0x62726d6170;

struct Box {
    unsigned char* target;
    size_t barrier;
    unsigned swizzle_bytes;
    std::vector<unsigned char> data;
};

// The sums of one thread's products: what they will be, while the thread's own are NaN.
struct Sums {
    float* at;
    unsigned count, products;
    std::vector<float> values;
};

struct Product {
    Wgmma what;
    std::vector<float*> sums;  // of each lane, in its `Sums`
    std::vector<std::pair<Fiber*, float*>> owners;
    unsigned a[WARP][4];
    const unsigned* registers[WARP];
};

// Registers of left factors as a thread's last fence found them.
struct Fenced {
    const unsigned* at = nullptr;
    std::vector<unsigned> values;

    bool has(const unsigned* a) const { return at && a >= at && a + 4 <= at + values.size(); }
};

// The products of one warp, oldest group first; the last is not committed yet.
struct Products {
    std::deque<std::vector<Product>> groups{1};
    bool fenced = false;
    uint64_t history = 0;
};

// A swizzle exchanges chunks of 16 bytes by the address: its bits from 4 on, as many as the span has, by those from 7 on.
static size_t swizzled(size_t address, size_t span) {
    size_t bits = span >= 128 ? 7 : span == 64 ? 3 : span == 32 ? 1 : 0;
    return address ^ ((address >> 7 & bits) << 4);
}

// What a block keeps of these.
struct Engines {
    std::vector<CountingBarrier> barriers;
    std::deque<Box> boxes;
    std::vector<Products> products;              // by warp
    std::vector<std::vector<Sums>> sums;         // by thread
    std::vector<Fenced> fenced;                  // by thread
    unsigned char* view;                         // shared memory as the engines see it
    bool used;
    float a[16][16], b[16][256], sum[16][256];   // of the product that is being done
};

static Engines& engines() {
    Block* block = self->block;
    Engines& engines = *block->engines;
    if (!engines.used) {
        engines.used = true;
        memset(engines.view, POISON, SHARED_BYTES);
        engines.products.assign(block->warps.size(), Products{});
        engines.sums.assign(block->threads, {});
        engines.fenced.assign(block->threads, {});
    }
    return engines;
}

static void forget_engines(Block* block) {
    Engines& engines = *block->engines;
    if (!engines.used) return;
    engines.barriers.clear();
    engines.boxes.clear();
    engines.products.clear();
    engines.sums.clear();
    engines.fenced.clear();
    engines.used = false;
}

unsigned shared_offset(const void* pointer) {
    auto at = static_cast<const unsigned char*>(pointer);
    if (at < self->block->shared || at >= self->block->shared + SHARED_BYTES) fail("%p is no shared memory", pointer);
    return unsigned(at - self->block->shared);
}

// ---- barriers that count bytes -------------------------------------------------------------------------------------

static CountingBarrier& counting_barrier(const void* address, const char* site) {
    for (CountingBarrier& barrier : engines().barriers)
        if (barrier.address == address) return barrier;
    fail("%s: there is no barrier at byte %u of shared memory", site, shared_offset(address));
}

void mbarrier_init(void* address, unsigned count) {
    if (reinterpret_cast<uintptr_t>(address) % 8 || count == 0) fail("a barrier of %u arrivals at %p", count, address);
    for (CountingBarrier& barrier : engines().barriers)
        if (barrier.address == address) fail("a barrier at byte %u of shared memory is made twice", shared_offset(address));
    engines().barriers.push_back({address, count, count, 0, 0, 0, false, {}});
}

void mbarriers_publish() {
    for (CountingBarrier& barrier : engines().barriers) barrier.published = true;
}

// Ends the phase if nothing is missing. True if copies are under way of which the phase knows nothing.
static bool forgets_bytes(CountingBarrier& barrier) {
    if (barrier.missing || barrier.bytes) return false;
    if (barrier.under_way) return true;
    barrier.missing = barrier.count;
    barrier.phase++;
    for (Fiber* fiber : barrier.waiting) fiber->state = RUNNABLE;
    barrier.waiting.clear();
    return false;
}

void mbarrier_arrive(void* address, const char* site) {
    CountingBarrier& barrier = counting_barrier(address, site);
    if (barrier.missing == 0) fail("%s: more arrivals in a phase than the barrier's %u", site, barrier.count);
    barrier.missing--;
    if (forgets_bytes(barrier))
        fail("%s: the phase ends with %lld bytes under way that nobody expected", site, barrier.under_way);
}

void mbarrier_expect(void* address, unsigned bytes, const char* site) {
    CountingBarrier& barrier = counting_barrier(address, site);
    if (barrier.missing == 0) fail("%s: bytes are expected after the last arrival of a phase", site);
    barrier.bytes += bytes;
}

void mbarrier_wait(void* address, unsigned parity, const char* site) {
    if (parity > 1) fail("%s: a barrier's parity is 0 or 1, not %u", site, parity);
    for (;;) {
        CountingBarrier& barrier = counting_barrier(address, site);
        if (barrier.phase % 2 != parity) return;
        barrier.waiting.push_back(self);
        wait_as(AT_BARRIER, site);
    }
}

// ---- the copy engine -----------------------------------------------------------------------------------------------

// Reads a box from the tensor: zeros where it has no elements.
static void read_box(const TensorWords& map, const long long (&first)[3], std::vector<unsigned char>& data) {
    size_t row_bytes = map.box[0] * map.element_bytes;
    data.assign(row_bytes * map.box[1] * map.box[2], 0);
    long long begin = first[0] < 0 ? 0 : first[0];
    long long end = first[0] + (long long)map.box[0] < (long long)map.extents[0] ? first[0] + (long long)map.box[0]
                                                                                   : (long long)map.extents[0];
    if (begin >= end) return;
    for (uint64_t z = 0; z < map.box[2]; z++)
        for (uint64_t y = 0; y < map.box[1]; y++) {
            long long at_z = first[2] + (long long)z, at_y = first[1] + (long long)y;
            if (at_z < 0 || at_z >= (long long)map.extents[2] || at_y < 0 || at_y >= (long long)map.extents[1]) continue;
            auto row = reinterpret_cast<const unsigned char*>(map.base) + at_z * map.strides[1] + at_y * map.strides[0];
            memcpy(data.data() + (z * map.box[1] + y) * row_bytes + (begin - first[0]) * map.element_bytes,
                   row + begin * map.element_bytes, (end - begin) * map.element_bytes);
        }
}

void copy_box(void* target, const void* words, int x, int y, int z, void* address, const char* site) {
    TensorWords map;
    memcpy(&map, words, sizeof map);
    if (map.mark != MAP_MARK) fail("%s: what is given is no map of a tensor", site);
    CountingBarrier& barrier = counting_barrier(address, site);
    if (!barrier.published) fail("%s: the barrier was not shown to the copy engine", site);
    unsigned offset = shared_offset(target);
    if (offset % 128) fail("%s: a box at byte %u of shared memory, which is no multiple of 128", site, offset);
    long long first[3] = {x, y, z};
    Box box{static_cast<unsigned char*>(target), size_t(&barrier - engines().barriers.data()), unsigned(map.swizzle_bytes), {}};
    read_box(map, first, box.data);
    if (offset + box.data.size() > SHARED_BYTES) fail("%s: a box reaches beyond shared memory", site);
    memset(target, POISON, box.data.size());
    memset(engines().view + offset, POISON, box.data.size());
    barrier.under_way += (long long)box.data.size();
    engines().boxes.push_back(std::move(box));
}

// Lets all boxes come that are under way; whether there were any. Runs between the block's threads.
static bool deliver(Block* block) {
    Engines& engines = *block->engines;
    if (!engines.used || engines.boxes.empty()) return false;
    for (Box& box : engines.boxes) {
        if (block->failed) break;
        size_t offset = size_t(box.target - block->shared);
        for (size_t i = 0; i < box.data.size(); i += 16) {
            size_t at = swizzled(offset + i, box.swizzle_bytes);
            memcpy(block->shared + at, box.data.data() + i, 16);
            memcpy(engines.view + at, box.data.data() + i, 16);
        }
        CountingBarrier& barrier = engines.barriers[box.barrier];
        barrier.under_way -= (long long)box.data.size();
        barrier.bytes -= (long long)box.data.size();
        if (forgets_bytes(barrier)) {
            block->failed = true;
            snprintf(block->message, sizeof block->message,
                     "the phase of the barrier at byte %zu of shared memory ends with %lld bytes under way that nobody expected",
                     size_t(static_cast<const unsigned char*>(barrier.address) - block->shared), barrier.under_way);
        }
    }
    engines.boxes.clear();
    return true;
}

void proxy_fence() {
    Block* block = self->block;
    for (const SharedArray& array : block->arrays) memcpy(engines().view + array.offset, block->shared + array.offset, array.bytes);
}

// ---- products of a warp group ---------------------------------------------------------------------------------------

static Products& products() { return engines().products[size_t(self->warp - self->block->warps.data())]; }

static unsigned thread_index(const Fiber* fiber) { return unsigned(fiber - fiber->block->fibers.data()); }

void wgmma_fence(const unsigned* registers, unsigned count) {
    exchange(0xffffffffu, 0, "wgmma.fence", [](unsigned char (*)[SLOT_BYTES]) { return 0; });
    products().fenced = true;
    engines().fenced[thread_index(self)] = {registers, std::vector<unsigned>(registers, registers + count)};
}

void wgmma_commit(const char* site) {
    exchange(0xffffffffu, 0, site, [](unsigned char (*)[SLOT_BYTES]) { return 0; });
    if (self->lane == 0) products().groups.emplace_back();
    exchange(0xffffffffu, 0, site, [](unsigned char (*)[SLOT_BYTES]) { return 0; });
}

// This lane's sums as products see them; the thread's own become NaN.
static float* begin_sums(const Wgmma& what) {
    auto& all = engines().sums[thread_index(self)];
    for (Sums& sums : all)
        if (sums.at == what.sum) {
            sums.products++;
            return sums.values.data();
        }
    all.push_back({what.sum, what.count, 1, std::vector<float>(what.sum, what.sum + what.count)});
    memset(what.sum, POISON, what.count * sizeof(float));
    return all.back().values.data();
}

// One product has ended: after the last of these sums, the thread gets them.
static void end_sums(Fiber* owner, float* at) {
    auto& all = owner->block->engines->sums[thread_index(owner)];
    for (size_t i = 0; i < all.size(); i++) {
        Sums& sums = all[i];
        if (sums.at != at || --sums.products) continue;
        for (unsigned j = 0; j < sums.count; j++) {
            unsigned bits;
            memcpy(&bits, at + j, 4);
            if (bits != 0xffffffffu) fail("sums were written while wgmma was adding to them");
        }
        memcpy(at, sums.values.data(), sums.count * sizeof(float));
        all.erase(all.begin() + long(i));
        return;
    }
}

void wgmma(const Wgmma& what, const char* site) {
    struct Operands {
        Wgmma what;
        float* sums;
    };
    Operands mine{what, begin_sums(what)};
    const Fenced& shown = engines().fenced[thread_index(self)];
    bool is_fenced = what.a && shown.has(what.a);
    if (is_fenced && memcmp(what.a, shown.values.data() + (what.a - shown.at), 16))
        fail("%s: registers of a left factor were written between their fence and wgmma", site);
    // Registers of A have been written since the last product, or it would be the same one.
    if (!products().fenced) fail("%s: wgmma without a fence after its registers were used", site);
    exchange(0xffffffffu, mine, site, [&](unsigned char (*slots)[SLOT_BYTES]) {
        auto first = slot<Operands>(slots, 0);
        if (first.what.a_shared != what.a_shared || first.what.b_shared != what.b_shared || first.what.count != what.count ||
            first.what.adds != what.adds)
            fail("%s: lanes of a warp multiply different factors", site);
        if (self->lane) return 0;
        Product product;
        product.what = what;
        for (unsigned lane = 0; lane < WARP; lane++) {
            auto of = slot<Operands>(slots, lane);
            product.sums.push_back(of.sums);
            product.owners.push_back({self + lane, of.what.sum});
            product.registers[lane] = of.what.a;
            if (of.what.a) memcpy(product.a[lane], of.what.a, sizeof product.a[lane]);
        }
        Products& all = products();
        all.history = (all.history * 31 + what.b_shared) * 31 + what.a_shared + what.count;
        all.groups.back().push_back(std::move(product));
        return 0;
    });
    if (what.a && !is_fenced) products().fenced = false;  // the next registers want another one
    exchange(0xffffffffu, 0, site, [](unsigned char (*)[SLOT_BYTES]) { return 0; });
}

// A factor in shared memory, by its descriptor (PTX ISA, "Matrix Descriptor Format" and "Canonical Layouts").
struct Factor {
    size_t start, leading, stride, span;
    bool along_depth;  // K-major

    Factor(uint64_t bits, bool along_depth) : along_depth(along_depth) {
        static const size_t SPANS[] = {16, 128, 64, 32};
        start = (bits & 0x3fff) << 4, leading = (bits >> 16 & 0x3fff) << 4, stride = (bits >> 32 & 0x3fff) << 4;
        span = SPANS[bits >> 62];
        if (bits >> 49 & 7) fail("a factor with a base offset, which the emulation does not know");
    }
    // Where element (row or column `index`, depth `k`) lies.
    size_t at(size_t index, size_t k) const {
        size_t chunk = span / 2;  // elements of a row of the pattern
        size_t address;
        if (along_depth) {
            address = span == 16 ? start + index / 8 * stride + index % 8 * 16 + k / 8 * leading + k % 8 * 2
                                 : start + index / 8 * stride + index % 8 * span + k * 2;
        } else {
            address = span == 16 ? start + index / 8 * stride + index % 8 * 2 + k / 8 * leading + k % 8 * 16
                                 : start + index / chunk * leading + index % chunk * 2 + k / 8 * stride + k % 8 * span;
        }
        return swizzled(address, span == 16 ? 0 : span);
    }
};

static float element(const Engines& engines, const Factor& factor, size_t index, size_t k) {
    size_t at = factor.at(index, k);
    if (at + 2 > SHARED_BYTES) fail("wgmma reads byte %zu of shared memory", at);
    uint16_t half;
    memcpy(&half, engines.view + at, 2);
    return widen(half);
}

// Does one product of a warp.
static void multiply(Product& product) {
    Engines& engines = *self->block->engines;
    unsigned columns = product.what.count * 2;
    size_t first_row = size_t(self->warp - self->block->warps.data()) % 4 * 16;
    auto& a = engines.a;
    auto& b = engines.b;
    auto& sum = engines.sum;
    Factor of_b(product.what.b_shared, !product.what.b_transposed), of_a(product.what.a_shared, !product.what.a_transposed);
    for (unsigned column = 0; column < columns; column++)
        for (unsigned k = 0; k < 16; k++) b[k][column] = element(engines, of_b, column, k);
    for (unsigned lane = 0; lane < WARP; lane++) {
        unsigned g = lane / 4, t = lane % 4;
        if (product.what.a) {
            if (memcmp(product.registers[lane], product.a[lane], sizeof product.a[lane]))
                fail("registers of a left factor were written while wgmma was reading them");
            for (unsigned i = 0; i < 4; i++)
                for (unsigned half = 0; half < 2; half++)
                    a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = widen(product.a[lane][i] >> 16 * half & 0xffff);
        }
        for (unsigned i = 0; i < product.what.count; i++)
            sum[g + i / 2 % 2 * 8][i / 4 * 8 + 2 * t + i % 2] = product.what.adds ? product.sums[lane][i] : 0.0f;
    }
    if (!product.what.a)
        for (unsigned row = 0; row < 16; row++)
            for (unsigned k = 0; k < 16; k++) a[row][k] = element(engines, of_a, first_row + row, k);
    for (unsigned row = 0; row < 16; row++)
        for (unsigned k = 0; k < 16; k++)
            for (unsigned column = 0; column < columns; column++) sum[row][column] += a[row][k] * b[k][column];
    for (unsigned lane = 0; lane < WARP; lane++)
        for (unsigned i = 0; i < product.what.count; i++)
            product.sums[lane][i] = sum[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
}

void wgmma_wait(unsigned groups_left, const char* site) {
    exchange(0xffffffffu, 0, site, [](unsigned char (*)[SLOT_BYTES]) { return 0; });
    if (self->lane == 0) {
        auto& groups = products().groups;
        while (groups.size() > size_t(groups_left) + 1) {
            for (Product& product : groups.front()) {
                multiply(product);
                for (auto& owner : product.owners) end_sums(owner.first, owner.second);
            }
            groups.pop_front();
        }
        products().fenced = false;  // registers may be used again, and then want another fence
    }
    exchange(0xffffffffu, 0, site, [](unsigned char (*)[SLOT_BYTES]) { return 0; });
}

// What a block may not leave behind; null if it left nothing.
static const char* left_behind(Block* block) {
    Engines& engines = *block->engines;
    if (!engines.used) return nullptr;
    if (!engines.boxes.empty()) return "the block ended with copies to shared memory under way";
    for (const Products& products : engines.products)
        if (products.groups.size() > 1 || !products.groups.front().empty()) return "the block ended with products nobody waited for";
    for (size_t warp = 0; warp < engines.products.size(); warp++)
        if (engines.products[warp].history != engines.products[warp / 4 * 4].history)
            return "warps of a warp group did different products";
    return nullptr;
}

// What waiting threads may be waiting for, besides each other.
static void describe_waiting(Block* block, char* text, size_t bytes) {
    text[0] = 0;
    if (!block->engines->used) return;
    for (const CountingBarrier& barrier : block->engines->barriers)
        if (!barrier.waiting.empty()) {
            snprintf(text, bytes, "; the barrier at byte %zu of shared memory misses %u arrivals and %lld bytes",
                     size_t(static_cast<const unsigned char*>(barrier.address) - block->shared), barrier.missing, barrier.bytes);
            return;
        }
}

}  // namespace emu
