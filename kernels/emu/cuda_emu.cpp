// The emulation's engine: fibers and their scheduler, shared memory, warp operations, asynchronous copies, guarded memory.

#include "cuda_emu.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

// Built with the address sanitizer, the engine tells it of every switch between stacks and poisons the margins of shared arrays.
#ifdef BRIGHTRUN_EMU_SANITIZED
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#endif

// A fault is handled on a stack that the sanitizer does not follow.
#define UNSANITIZED __attribute__((no_sanitize("address")))

namespace emu {

__thread Fiber* self = nullptr;

namespace {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t GUARD_BYTES = 4096;
constexpr size_t SIGNAL_STACK_BYTES = 64 * 1024;
constexpr unsigned MOST_THREADS = 1024;
// Shared memory of a block: what sm_90 offers it, and what its own arrays may have.
constexpr size_t SHARED_BYTES = 227 * 1024;
constexpr size_t STATIC_SHARED_BYTES = 48 * 1024;
// What memory that the launch sizes is aligned to (DYNAMIC_SHARED). It lies behind the kernel's own arrays.
constexpr size_t DYNAMIC_ALIGNMENT = 1024;
// Between shared arrays, to see writes past their ends.
constexpr size_t MARGIN = 64;
constexpr unsigned char MARGIN_BYTE = 0xA5;
// NaN in every float type.
constexpr unsigned char POISON = 0xFF;
constexpr unsigned NAMED_BARRIERS = 16;

enum State { RUNNABLE, AT_BARRIER, IN_WARP, FINISHED };

struct SharedArray {
    const void* key;
    size_t offset, bytes;
};

struct NamedBarrier {
    unsigned arrived;
    unsigned count;
    std::vector<Fiber*> waiting;
};

struct Pending {
    void* target;
    unsigned bytes;
    unsigned char data[16];
};

// Groups of copies of one thread, oldest first; the last is not committed yet.
struct Copies {
    std::deque<std::vector<Pending>> groups{1};
};

}  // namespace

struct Engines;

// One block that runs, and the memory it runs in.
struct Block {
    Frame frame;
    unsigned threads, alive, at_barrier, phase;
    const char* barrier_site;
    void (*entry)(void**);
    void** arguments;
    const char* kernel;
    void* scheduler;  // its stack pointer while a fiber runs, and its stack
    const void* scheduler_bottom;
    size_t scheduler_bytes;
    unsigned char* shared;
    size_t shared_used, dynamic_bytes, static_bytes, shared_limit;
    std::vector<SharedArray> arrays;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    NamedBarrier named[NAMED_BARRIERS];
    Engines* engines;
    unsigned char* stacks;
    void* signal_stack;
    bool failed;
    char message[1024];
};

// A range of device memory that a launch was given.
struct Range {
    const unsigned char* begin;
    size_t bytes;
};

struct Launch {
    const char* kernel;
    unsigned grid[3], block[3];
    size_t shared_bytes, shared_limit;  // what the launch adds, and what a block may have
    unsigned workers;
    const Range* ranges;
    size_t range_count;
    size_t period, last;  // of each so many blocks only so many at the end are run
};

// ---- switching -----------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(BRIGHTRUN_EMU_SANITIZED)

extern "C" void emu_switch(void** save, void* restore);
// Saves what the System V calling convention asks a function to keep, and nothing else: no system call, about ten instructions.
asm(R"(
    .text
    .globl emu_switch
    .hidden emu_switch
    .type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emu_switch, .-emu_switch
)");

static void* prepared(unsigned char* top, void (*main)()) {
    void** stack = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 6; i++) stack[i] = nullptr;
    stack[6] = reinterpret_cast<void*>(main);
    stack[7] = nullptr;  // where `main` would return to: it never does
    return stack;
}

#else

// A stack pointer is a context that lies at the top of its own stack; the scheduler's lies on its thread's stack.
extern "C" void emu_switch(void** save, void* restore) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(restore));
}

static void* prepared(unsigned char* top, void (*main)()) {
    size_t room = (sizeof(ucontext_t) + 63) & ~size_t(63);
    ucontext_t* context = reinterpret_cast<ucontext_t*>(top - room);
    getcontext(context);
    context->uc_stack.ss_sp = top - (STACK_BYTES - GUARD_BYTES);
    context->uc_stack.ss_size = STACK_BYTES - GUARD_BYTES - room;
    context->uc_link = nullptr;
    makecontext(context, main, 0);
    return context;
}

#endif

// What the sanitizer wants to hear before and after a switch: the stack that is switched to, and where to keep what it knows of
// the one that is left, if that is to be returned to.
static void leaving(void** fake_stack, const void* bottom, size_t bytes) {
#ifdef BRIGHTRUN_EMU_SANITIZED
    __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
#else
    (void)fake_stack, (void)bottom, (void)bytes;
#endif
}

static void arrived(void* fake_stack, const void** bottom, size_t* bytes) {
#ifdef BRIGHTRUN_EMU_SANITIZED
    __sanitizer_finish_switch_fiber(fake_stack, bottom, bytes);
#else
    (void)fake_stack, (void)bottom, (void)bytes;
#endif
}

// Gives the thread back to the scheduler; for good, if this fiber is never resumed.
static void to_scheduler(bool for_good = false) {
    Block* block = self->block;
    leaving(for_good ? nullptr : &self->fake_stack, block->scheduler_bottom, block->scheduler_bytes);
    emu_switch(&self->stack_pointer, block->scheduler);
    arrived(self->fake_stack, nullptr, nullptr);
}

static void wait_as(State state, const char* site) {
    self->state = state;
    self->site = site;
    to_scheduler();
}

static void fiber_main() {
    Block* block = self->block;
    arrived(nullptr, &block->scheduler_bottom, &block->scheduler_bytes);
    block->entry(block->arguments);
    self->state = FINISHED;
    block->alive--;
    to_scheduler(true);
}

// ---- failing -------------------------------------------------------------------------------------------------------

static void describe(Block* block, const char* format, va_list values) {
    if (block->failed) return;
    block->failed = true;
    int used = snprintf(block->message, sizeof block->message, "block (%u, %u, %u), thread (%u, %u, %u): ", block->frame.block.x,
                        block->frame.block.y, block->frame.block.z, self->thread.x, self->thread.y, self->thread.z);
    vsnprintf(block->message + used, sizeof block->message - used, format, values);
}

void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    describe(self->block, format, values);
    va_end(values);
    to_scheduler(true);
    abort();  // never resumed
}

// ---- waiting for each other ----------------------------------------------------------------------------------------

void block_barrier(const char* site) {
    Block* block = self->block;
    if (block->alive != block->threads) fail("%s: a barrier after %u threads have left", site, block->threads - block->alive);
    if (block->at_barrier == 0) {
        block->barrier_site = site;
    } else if (strcmp(block->barrier_site, site) != 0) {
        fail("threads of a block wait at two barriers, %s and %s", block->barrier_site, site);
    }
    block->at_barrier++;
    if (block->at_barrier < block->threads) return wait_as(AT_BARRIER, site);
    block->at_barrier = 0;
    block->phase++;
    for (Fiber& fiber : block->fibers)
        if (fiber.state == AT_BARRIER) fiber.state = RUNNABLE;
}

void named_barrier(unsigned id, unsigned count, bool waits, const char* site) {
    Block* block = self->block;
    if (id >= NAMED_BARRIERS) fail("%s: there is no barrier %u", site, id);
    NamedBarrier& barrier = block->named[id];
    if (barrier.arrived == 0) barrier.count = count;
    if (barrier.count != count) fail("%s: barrier %u is waited for with counts %u and %u", site, id, barrier.count, count);
    barrier.arrived++;
    if (barrier.arrived < count) {
        if (!waits) return;
        barrier.waiting.push_back(self);
        return wait_as(AT_BARRIER, site);
    }
    barrier.arrived = 0;
    for (Fiber* fiber : barrier.waiting) fiber->state = RUNNABLE;
    barrier.waiting.clear();
}

unsigned char (*warp_exchange(unsigned mask, const void* value, unsigned bytes, void (*finish)(unsigned char (*)[SLOT_BYTES]),
                              const char* site, int* parity))[SLOT_BYTES] {
    Fiber* me = self;
    Warp* warp = me->warp;
    unsigned bit = 1u << me->lane;
    if (!(mask & bit)) fail("%s: lane %u takes part with mask %08x, which leaves it out", site, me->lane, mask);
    int own = warp->parity;
    while (warp->arrived == 0 && warp->unread[own]) {  // slow readers of the last but one operation
        wait_as(RUNNABLE, site);
        own = warp->parity;
    }
    if (warp->arrived == 0) {
        warp->expected = mask;
        warp->site = site;
    } else if (warp->expected != mask || strcmp(warp->site, site) != 0) {
        fail("lanes of a warp are in two operations, %s with mask %08x and %s with mask %08x", warp->site, warp->expected, site, mask);
    }
    memcpy(warp->slots[own][me->lane], value, bytes);
    warp->arrived |= bit;
    *parity = own;
    if (warp->arrived != mask) {
        wait_as(IN_WARP, site);
        return warp->slots[own];
    }
    warp->arrived = 0;
    warp->parity ^= 1;
    warp->unread[own] = mask;
    if (finish) finish(warp->slots[own]);
    Block* block = me->block;
    Fiber* first = me - me->lane;
    for (unsigned lane = 0; lane < WARP && first + lane < block->fibers.data() + block->threads; lane++)
        if (mask >> lane & 1 && first[lane].state == IN_WARP) first[lane].state = RUNNABLE;
    return warp->slots[own];
}

// ---- shared memory -------------------------------------------------------------------------------------------------

static size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

static unsigned char* place(Block* block, const void* key, size_t bytes, size_t alignment) {
    size_t offset = rounded(block->shared_used, alignment);
    ASAN_UNPOISON_MEMORY_REGION(block->shared + block->shared_used, offset - block->shared_used + bytes + MARGIN);
    memset(block->shared + block->shared_used, MARGIN_BYTE, offset - block->shared_used);
    memset(block->shared + offset, POISON, bytes);
    memset(block->shared + offset + bytes, MARGIN_BYTE, MARGIN);
    ASAN_POISON_MEMORY_REGION(block->shared + offset + bytes, MARGIN);
    block->shared_used = offset + bytes + MARGIN;
    block->arrays.push_back({key, offset, bytes});
    return block->shared + offset;
}

void* shared_array(const void* key, size_t bytes, size_t alignment) {
    Block* block = self->block;
    for (const SharedArray& array : block->arrays)
        if (array.key == key) return block->shared + array.offset;
    block->static_bytes = rounded(block->static_bytes, alignment) + bytes;
    if (block->static_bytes > STATIC_SHARED_BYTES) fail("static shared memory of %zu bytes exceeds 48 KB", block->static_bytes);
    size_t all = rounded(block->static_bytes, DYNAMIC_ALIGNMENT) + block->dynamic_bytes;
    if (all > block->shared_limit) fail("shared memory of %zu bytes exceeds %zu KB", all, block->shared_limit / 1024);
    return place(block, key, bytes, alignment);
}

void* dynamic_shared() {
    if (self->block->dynamic_bytes == 0) fail("the kernel uses dynamic shared memory and was launched with none");
    return self->block->shared;
}

size_t dynamic_shared_bytes() { return self->block->dynamic_bytes; }

static void check_margins(Block* block) {
    ASAN_UNPOISON_MEMORY_REGION(block->shared, block->shared_used);
    for (const SharedArray& array : block->arrays)
        for (size_t i = 0; i < MARGIN; i++)
            if (block->shared[array.offset + array.bytes + i] != MARGIN_BYTE && !block->failed) {
                block->failed = true;
                snprintf(block->message, sizeof block->message,
                         "block (%u, %u, %u): a shared array of %zu bytes was written %zu bytes past its end", block->frame.block.x,
                         block->frame.block.y, block->frame.block.z, array.bytes, i);
            }
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------

static Copies& copies() {
    if (!self->copies) self->copies = new Copies;
    return *static_cast<Copies*>(self->copies);
}

void copy_async(void* target, const void* source, unsigned bytes, unsigned valid) {
    if (reinterpret_cast<uintptr_t>(target) % bytes || (valid && reinterpret_cast<uintptr_t>(source) % bytes))
        fail("cp.async of %u bytes is not aligned to its size: to %p from %p", bytes, target, source);
    Pending pending{target, bytes, {}};
    if (valid) memcpy(pending.data, source, valid);
    memset(target, POISON, bytes);
    copies().groups.back().push_back(pending);
}

void copy_async_commit() { copies().groups.emplace_back(); }

void copy_async_wait(unsigned groups_left) {
    auto& groups = copies().groups;
    while (groups.size() > size_t(groups_left) + 1) {
        for (const Pending& pending : groups.front()) memcpy(pending.target, pending.data, pending.bytes);
        groups.pop_front();
    }
}

// ---- tensor cores --------------------------------------------------------------------------------------------------

static float widen(unsigned half) {
    unsigned bits = half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// D = A B + C for A 16×16 and B 16×8 in bf16, C and D in f32, in the fragments of PTX ISA 9.7.14.5.8: a slot holds four
// registers of A, two of B and four of C, and gets D after them.
void mma_m16n8k16_bf16(unsigned char (*slots)[SLOT_BYTES]) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        unsigned registers[6];
        float sums[4];
        memcpy(registers, slots[lane], sizeof registers);
        memcpy(sums, slots[lane] + sizeof registers, sizeof sums);
        int group = lane / 4, pair = lane % 4 * 2;
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++) a[group + i % 2 * 8][pair + i / 2 * 8 + half] = widen(registers[i] >> 16 * half & 0xFFFF);
            for (int i = 0; i < 2; i++) b[pair + i * 8 + half][group] = widen(registers[4 + i] >> 16 * half & 0xFFFF);
            for (int i = 0; i < 2; i++) c[group + i * 8][pair + half] = sums[2 * i + half];
        }
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < WARP; lane++) {
        int group = lane / 4, pair = lane % 4 * 2;
        float sums[4] = {c[group][pair], c[group][pair + 1], c[group + 8][pair], c[group + 8][pair + 1]};
        memcpy(slots[lane] + 40, sums, sizeof sums);
    }
}

// Four 8×8 matrices of 16-bit elements (PTX ISA, ldmatrix): a slot begins with the address of a row, lanes 8 i to 8 i + 7 having
// those of matrix i, and gets four registers at byte 16: of matrix i, elements 2 (lane % 4) and the next of row lane / 4, or
// the same of the transposed matrix.
static void ldmatrix(unsigned char (*slots)[SLOT_BYTES], bool transposed) {
    uint16_t matrices[4][8][8];
    for (int lane = 0; lane < WARP; lane++) {
        const void* row;
        memcpy(&row, slots[lane], sizeof row);
        if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: the row of lane %d is not aligned to 16 bytes: %p", lane, row);
        memcpy(matrices[lane / 8][lane % 8], row, 16);
    }
    for (int lane = 0; lane < WARP; lane++) {
        unsigned registers[4];
        int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
            auto& matrix = matrices[i];
            unsigned low = transposed ? matrix[column][row] : matrix[row][column];
            unsigned high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
            registers[i] = low | high << 16;
        }
        memcpy(slots[lane] + 16, registers, sizeof registers);
    }
}

void ldmatrix_x4(unsigned char (*slots)[SLOT_BYTES]) { ldmatrix(slots, false); }
void ldmatrix_x4_transposed(unsigned char (*slots)[SLOT_BYTES]) { ldmatrix(slots, true); }

}  // namespace emu

#include "hopper_emu.h"

namespace emu {

// ---- running -------------------------------------------------------------------------------------------------------

static void enter(Block* block, Fiber* fiber) {
    self = fiber;
    void* fake_stack = nullptr;
    size_t index = size_t(fiber - block->fibers.data());
    leaving(&fake_stack, block->stacks + index * STACK_BYTES + GUARD_BYTES, STACK_BYTES - GUARD_BYTES);
    emu_switch(&block->scheduler, fiber->stack_pointer);
    arrived(fake_stack, nullptr, nullptr);
    self = nullptr;
}

// Runs a warp until each of its lanes waits for another warp or has finished; whether any ran at all.
static bool run_warp(Block* block, unsigned warp) {
    unsigned first = warp * WARP;
    unsigned count = block->threads - first < WARP ? block->threads - first : WARP;
    bool ran = false;
    for (bool again = true; again;) {
        again = false;
        for (unsigned turn = 0; turn < count; turn++) {
            bool falling = (block->phase + block->frame.block.x) % 2;
            Fiber* fiber = &block->fibers[first + (falling ? count - 1 - turn : turn)];
            if (fiber->state != RUNNABLE) continue;
            enter(block, fiber);
            if (block->failed) return true;
            again = ran = true;
        }
    }
    return ran;
}

static void report_deadlock(Block* block) {
    const char* site = "";
    unsigned waiting = 0;
    for (const Fiber& fiber : block->fibers)
        if (fiber.state != FINISHED) {
            waiting++;
            site = fiber.site;
        }
    block->failed = true;
    char more[160];
    describe_waiting(block, more, sizeof more);
    snprintf(block->message, sizeof block->message, "block (%u, %u, %u): %u of %u threads wait at %s for others that never come%s",
             block->frame.block.x, block->frame.block.y, block->frame.block.z, waiting, block->threads, site, more);
}

static void prepare(Block* block, const Launch& launch, size_t index) {
    block->frame.block = {unsigned(index % launch.grid[0]), unsigned(index / launch.grid[0] % launch.grid[1]),
                          unsigned(index / launch.grid[0] / launch.grid[1])};
    block->alive = block->threads;
    block->at_barrier = block->phase = 0;
    block->arrays.clear();
    block->shared_used = block->static_bytes = 0;
    if (block->dynamic_bytes) place(block, nullptr, block->dynamic_bytes, DYNAMIC_ALIGNMENT);
    for (NamedBarrier& barrier : block->named) {
        barrier.arrived = 0;
        barrier.waiting.clear();
    }
    for (Warp& warp : block->warps) {
        warp.arrived = warp.unread[0] = warp.unread[1] = 0;
        warp.parity = 0;
    }
    for (unsigned i = 0; i < block->threads; i++) {
        Fiber& fiber = block->fibers[i];
        fiber.state = RUNNABLE;
        fiber.stack_pointer = prepared(block->stacks + (i + 1) * STACK_BYTES, fiber_main);
    }
}

static void forget_copies(Block* block) {
    for (Fiber& fiber : block->fibers) {
        delete static_cast<Copies*>(fiber.copies);
        fiber.copies = nullptr;
    }
}

static void run_block(Block* block, const Launch& launch, size_t index) {
    prepare(block, launch, index);
    unsigned warps = unsigned(block->warps.size());
    while (block->alive && !block->failed) {
        bool ran = false;
        for (unsigned turn = 0; turn < warps && !block->failed; turn++) {
            bool falling = (block->phase + block->frame.block.x) % 2;
            ran |= run_warp(block, falling ? warps - 1 - turn : turn);
        }
        if (!ran && !block->failed && !deliver(block)) report_deadlock(block);
    }
    if (!block->failed) check_margins(block);
    if (const char* what = block->failed ? nullptr : left_behind(block)) {
        block->failed = true;
        snprintf(block->message, sizeof block->message, "block (%u, %u, %u): %s", block->frame.block.x, block->frame.block.y,
                 block->frame.block.z, what);
    }
    forget_copies(block);
    forget_engines(block);
}

// ---- memory outside a block's reach --------------------------------------------------------------------------------

static __thread const Launch* running = nullptr;
static struct sigaction previous_segv, previous_bus, previous_ill;

UNSANITIZED static void describe_fault(Block* block, const unsigned char* address) {
    const Launch* launch = running;
    size_t best = 0;
    ptrdiff_t distance = PTRDIFF_MAX;
    for (size_t i = 0; launch && i < launch->range_count; i++) {
        const Range& range = launch->ranges[i];
        ptrdiff_t past = address >= range.begin ? address - (range.begin + range.bytes) : range.begin - address;
        if (range.bytes && past < distance) {
            distance = past;
            best = i;
        }
    }
    char text[256];
    if (distance < (ptrdiff_t(1) << 40)) {
        const Range& range = launch->ranges[best];
        snprintf(text, sizeof text, "touched memory %td bytes %s buffer %zu of the launch (%zu bytes)", distance,
                 address >= range.begin ? "past the end of" : "before", best, range.bytes);
    } else {
        snprintf(text, sizeof text, "touched memory that is nobody's, at %p", address);
    }
    block->failed = true;
    snprintf(block->message, sizeof block->message, "block (%u, %u, %u), thread (%u, %u, %u): %s", block->frame.block.x,
             block->frame.block.y, block->frame.block.z, self->thread.x, self->thread.y, self->thread.z, text);
}

// A check of the compiler's inside a fiber: misaligned access, index outside an array, overflow of a signed integer.
UNSANITIZED static void describe_trap(Block* block, void* address) {
    Dl_info info = {};
    dladdr(address, &info);
    size_t offset = size_t(static_cast<char*>(address) - static_cast<char*>(info.dli_fbase));
    block->failed = true;
    snprintf(block->message, sizeof block->message,
             "block (%u, %u, %u), thread (%u, %u, %u): a misaligned access, an index outside an array or an overflow, at %s "
             "(addr2line -e %s %#zx says where)",
             block->frame.block.x, block->frame.block.y, block->frame.block.z, self->thread.x, self->thread.y, self->thread.z,
             info.dli_sname ? info.dli_sname : "an unnamed function", info.dli_fname ? info.dli_fname : "?", offset);
}

// A fault inside a fiber ends its launch with a message; any other one goes to whoever handled it before.
UNSANITIZED static void on_fault(int signal, siginfo_t* info, void* context) {
    if (self) {
        if (signal == SIGILL)
            describe_trap(self->block, info->si_addr);
        else
            describe_fault(self->block, static_cast<unsigned char*>(info->si_addr));
        to_scheduler(true);
    }
    struct sigaction& previous = signal == SIGSEGV ? previous_segv : signal == SIGBUS ? previous_bus : previous_ill;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal);
    } else {
        sigaction(signal, &previous, nullptr);  // and fault again
    }
}

static void handle_faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
    sigaction(SIGILL, &action, &previous_ill);
}

static void* map(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

// ---- blocks are kept, since their stacks are dear ------------------------------------------------------------------

static std::mutex kept_lock;
static std::vector<Block*> kept;

static Block* take_block() {
    {
        std::lock_guard<std::mutex> guard(kept_lock);
        if (!kept.empty()) {
            Block* block = kept.back();
            kept.pop_back();
            return block;
        }
    }
    Block* block = new Block;
    size_t shared = (SHARED_BYTES + 64 * MARGIN + 4095) & ~size_t(4095);
    block->shared = static_cast<unsigned char*>(map(shared + GUARD_BYTES));
    block->stacks = static_cast<unsigned char*>(map(MOST_THREADS * STACK_BYTES));
    block->signal_stack = map(SIGNAL_STACK_BYTES);
    block->engines = new Engines{};
    block->engines->view = static_cast<unsigned char*>(map(SHARED_BYTES));
    if (!block->shared || !block->stacks || !block->signal_stack || !block->engines->view) return nullptr;
    mprotect(block->shared + shared, GUARD_BYTES, PROT_NONE);
    for (unsigned i = 0; i < MOST_THREADS; i++) mprotect(block->stacks + i * STACK_BYTES, GUARD_BYTES, PROT_NONE);
    return block;
}

static void put_back(Block* block) {
    std::lock_guard<std::mutex> guard(kept_lock);
    kept.push_back(block);
}

static void set_up(Block* block, const Launch& launch, void (*entry)(void**), void** arguments) {
    block->frame.grid = {launch.grid[0], launch.grid[1], launch.grid[2]};
    block->frame.block_size = {launch.block[0], launch.block[1], launch.block[2]};
    block->threads = launch.block[0] * launch.block[1] * launch.block[2];
    block->entry = entry;
    block->arguments = arguments;
    block->kernel = launch.kernel;
    block->dynamic_bytes = launch.shared_bytes;
    block->shared_limit = launch.shared_limit;
    block->failed = false;
    block->warps.resize((block->threads + WARP - 1) / WARP);
    block->fibers.assign(block->threads, Fiber{});
    for (unsigned i = 0; i < block->threads; i++) {
        Fiber& fiber = block->fibers[i];
        fiber.thread = {i % launch.block[0], i / launch.block[0] % launch.block[1], i / launch.block[0] / launch.block[1]};
        fiber.lane = i % WARP;
        fiber.warp = &block->warps[i / WARP];
        fiber.block = block;
    }
}

namespace {

// What the workers of one launch share.
struct Work {
    const Launch& launch;
    void (*entry)(void**);
    void** arguments;
    size_t blocks;
    std::atomic<size_t> next;
    std::atomic<bool> failed;
    std::mutex lock;
    char message[1024];

    Work(const Launch& launch, void (*entry)(void**), void** arguments)
        : launch(launch), entry(entry), arguments(arguments),
          blocks(size_t(launch.grid[0]) * launch.grid[1] * launch.grid[2]), next(0), failed(false), message() {}
};

void take_part(Work& work) {
    Block* block = take_block();
    if (!block) {
        std::lock_guard<std::mutex> guard(work.lock);
        snprintf(work.message, sizeof work.message, "no memory for the stacks of a block");
        work.failed = true;
        return;
    }
    stack_t own = {}, old = {};
    own.ss_sp = block->signal_stack;
    own.ss_size = SIGNAL_STACK_BYTES;
    sigaltstack(&own, &old);
    running = &work.launch;
    set_up(block, work.launch, work.entry, work.arguments);
    while (!work.failed) {
        size_t index = work.next++;
        if (index >= work.blocks) break;
        if (index % work.launch.period + work.launch.last < work.launch.period) continue;
        run_block(block, work.launch, index);
        if (block->failed) {
            std::lock_guard<std::mutex> guard(work.lock);
            if (!work.failed.exchange(true)) memcpy(work.message, block->message, sizeof work.message);
        }
    }
    running = nullptr;
    sigaltstack(&old, nullptr);
    put_back(block);
}

}  // namespace
}  // namespace emu

using namespace emu;

// Memory that ends, up to 16 bytes, at a protected page, and begins behind another, with NaN between.
extern "C" void* emu_allocate(size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE));
    size_t body = (bytes + page - 1) / page * page;
    unsigned char* memory = static_cast<unsigned char*>(map(body + 2 * page));
    if (!memory) return nullptr;
    mprotect(memory, page, PROT_NONE);
    mprotect(memory + page + body, page, PROT_NONE);
    size_t slack = body - (bytes + 15) / 16 * 16;
    memset(memory + page, POISON, slack);
    return memory + page + slack;
}

extern "C" void emu_free(void* address, size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE));
    size_t body = (bytes + page - 1) / page * page;
    munmap(static_cast<unsigned char*>(address) + (bytes + 15) / 16 * 16 - body - page, body + 2 * page);
}

// Runs a whole grid. 0 when it finished; otherwise `message` says what went wrong.
extern "C" int emu_launch(void (*entry)(void**), void** arguments, const Launch* launch, char* message, size_t message_bytes) {
    static std::once_flag handled;
    std::call_once(handled, handle_faults);
    size_t threads = size_t(launch->block[0]) * launch->block[1] * launch->block[2];
    size_t blocks = size_t(launch->grid[0]) * launch->grid[1] * launch->grid[2];
    if (blocks == 0 || launch->grid[0] > INT32_MAX || launch->grid[1] > 65535 || launch->grid[2] > 65535) {
        snprintf(message, message_bytes, "a grid of %u × %u × %u blocks cannot be launched", launch->grid[0], launch->grid[1],
                 launch->grid[2]);
        return 1;
    }
    if (threads == 0 || threads > MOST_THREADS || launch->shared_bytes > launch->shared_limit ||
        launch->shared_limit > SHARED_BYTES || launch->block[2] > 64) {
        snprintf(message, message_bytes, "%zu threads a block with %zu bytes of shared memory cannot be launched", threads,
                 launch->shared_bytes);
        return 1;
    }
    Work work(*launch, entry, arguments);
    size_t workers = launch->workers < work.blocks ? launch->workers : work.blocks;
    std::vector<std::thread> others;
    for (size_t i = 1; i < workers; i++) others.emplace_back([&work] { take_part(work); });
    take_part(work);
    for (std::thread& other : others) other.join();
    if (!work.failed) return 0;
    snprintf(message, message_bytes, "%s", work.message);
    return 1;
}
