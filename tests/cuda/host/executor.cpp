// The scheduler behind executor.h.
#include "executor.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <unordered_map>
#include <vector>

namespace executor {

Schedule schedule;

namespace {

constexpr size_t STACK = 256 * 1024, OUTER_FRAMES = 4096;
constexpr unsigned MOST_THREADS = 1024;
constexpr size_t SHARED_WITHOUT_CONSENT = 48 * 1024, SHARED_LIMIT = 227 * 1024;
constexpr int INVALID_CONFIGURATION = 9, INVALID_VALUE = 1;  // CUDA's codes

[[noreturn]] void fail(const char* what) {
    const Index &t = thread_index(), &b = block_index();
    std::fprintf(stderr, "host executor: %s (thread %u,%u,%u of block %u,%u,%u)\n", what, t.x, t.y, t.z, b.x, b.y,
                 b.z);
    std::fflush(stderr);
    std::_Exit(98);
}

// ---- switching stacks ---------------------------------------------------------------------------------------------

struct Context {
    void* stack_pointer = nullptr;
    void* fake_stack = nullptr;  // AddressSanitizer's, while this context sleeps
    const void* bottom = nullptr;
    size_t size = 0;
};

extern "C" void switch_stacks(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl switch_stacks
.type switch_stacks, @function
switch_stacks:
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
.size switch_stacks, .-switch_stacks
)");
constexpr size_t SAVED = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl switch_stacks
.type switch_stacks, %function
switch_stacks:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size switch_stacks, .-switch_stacks
)");
#else
#error "the host executor switches stacks on x86-64 and aarch64 only"
#endif

enum class State { READY, AT_BARRIER, IN_MEETING, FINISHED };

struct Fibre {
    Context context;
    char* stack = nullptr;
    Index index{};
    State state = State::FINISHED;
    Meeting meeting{};
    uint32_t mask = 0;
    uint64_t value = 0;
    int source = 0;
    bool predicate = false;
    Met met{};
};

struct SharedArray {
    const void* key;
    void* memory;
    size_t bytes;
};

std::vector<Fibre> fibres(MOST_THREADS);
unsigned n_threads = 0;
Context scheduler;
Fibre* current = nullptr;
Index block_at{}, block_dim{}, grid_dim{};
std::vector<SharedArray> shared_arrays;
void* dynamic_memory = nullptr;
size_t shared_used = 0, shared_limit = 0;  // static and dynamic
const std::function<void()>* kernel_body = nullptr;
std::unordered_map<const void*, size_t> consents;
std::mt19937_64 randomness;

void enter(Context& from, Context& to, bool from_ends) {
    __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.bottom, to.size);
    switch_stacks(&from.stack_pointer, to.stack_pointer);
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &size);
}

extern "C" void fibre_main() {
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    scheduler.bottom = bottom;
    scheduler.size = size;
    (*kernel_body)();
    current->state = State::FINISHED;
    enter(current->context, scheduler, true);
    std::abort();
}

void prepare(Fibre& fibre) {
    if (fibre.stack == nullptr) {
        void* memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for a stack");
        fibre.stack = static_cast<char*>(memory);
    }
    // The frames of fibre_main and of its last switch never return, so nobody has lifted their marks.
    __asan_unpoison_memory_region(fibre.stack + STACK - OUTER_FRAMES, OUTER_FRAMES);
    fibre.context.bottom = fibre.stack;
    fibre.context.size = STACK;
    fibre.context.fake_stack = nullptr;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(fibre.stack + STACK) - 1;  // a call leaves the stack 8 past 16 bytes
    *--top = reinterpret_cast<void*>(&fibre_main);
    top -= SAVED;
    std::memset(top, 0, SAVED * sizeof(void*));
    fibre.context.stack_pointer = top;
#else
    char* top = fibre.stack + STACK - 176;
    std::memset(top, 0, 160);
    reinterpret_cast<void**>(top)[11] = reinterpret_cast<void*>(&fibre_main);  // x30
    fibre.context.stack_pointer = top;
#endif
    fibre.state = State::READY;
}

void sleep_as(State state) {
    Fibre* self = current;
    self->state = state;
    enter(self->context, scheduler, false);
}

// ---- meetings -----------------------------------------------------------------------------------------------------

unsigned linear(const Index& t) { return t.x + block_dim.x * (t.y + block_dim.y * t.z); }

// Lets the lanes of a mask go on when the last one has come.
void settle_meeting(Fibre& last) {
    const unsigned first = linear(last.index) / 32 * 32;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(last.mask >> lane & 1u)) continue;
        if (first + lane >= n_threads) fail("a warp collective names a lane that the block does not have");
        const Fibre& other = fibres[first + lane];
        if (other.state == State::FINISHED) fail("a warp collective names a lane that has already returned");
        if (other.state == State::READY) return;
        if (other.state == State::AT_BARRIER) fail("a lane waits at __syncthreads while its warp waits in a collective");
        if (other.mask != last.mask || other.meeting != last.meeting) {
            fail("lanes of one warp meet in different collectives or with different masks");
        }
    }
    uint32_t ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if ((last.mask >> lane & 1u) && fibres[first + lane].predicate) ballot |= 1u << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(last.mask >> lane & 1u)) continue;
        Fibre& other = fibres[first + lane];
        if (other.source < 0 || other.source > 31 || !(last.mask >> other.source & 1u)) {
            fail("a shuffle reads from a lane that is not in its mask");
        }
        other.met = {fibres[first + static_cast<unsigned>(other.source)].value, ballot};
        other.state = State::READY;
    }
}

void settle_barrier() {
    for (unsigned i = 0; i < n_threads; ++i) {
        if (fibres[i].state == State::AT_BARRIER) fibres[i].state = State::READY;
    }
}

std::vector<unsigned> ordered(unsigned n) {
    std::vector<unsigned> order(n);
    std::iota(order.begin(), order.end(), 0u);
    if (schedule.order == Order::REVERSED) std::reverse(order.begin(), order.end());
    if (schedule.order == Order::SHUFFLED) std::shuffle(order.begin(), order.end(), randomness);
    return order;
}

void run_block() {
    for (unsigned i = 0; i < n_threads; ++i) {
        Fibre& fibre = fibres[i];
        prepare(fibre);
        fibre.index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
    }
    for (;;) {
        bool ran = false;
        for (unsigned i : ordered(n_threads)) {
            if (fibres[i].state != State::READY) continue;
            ran = true;
            current = &fibres[i];
            enter(scheduler, current->context, false);
            if (current->state == State::IN_MEETING) settle_meeting(*current);
        }
        unsigned waiting = 0, finished = 0;
        for (unsigned i = 0; i < n_threads; ++i) {
            waiting += fibres[i].state == State::AT_BARRIER;
            finished += fibres[i].state == State::FINISHED;
        }
        if (finished == n_threads) return;
        if (waiting + finished == n_threads) {
            settle_barrier();
        } else if (!ran) {
            fail("deadlock: some threads wait in a warp collective for lanes that wait elsewhere");
        }
    }
}

void release_shared() {
    for (const SharedArray& array : shared_arrays) std::free(array.memory);
    shared_arrays.clear();
    std::free(dynamic_memory);
    dynamic_memory = nullptr;
}

void* filled(size_t bytes) {
    void* memory = std::malloc(bytes);
    std::memset(memory, schedule.fill, bytes);
    return memory;
}

}  // namespace

const Index& thread_index() {
    static const Index none{};
    return current ? current->index : none;
}
const Index& block_index() { return block_at; }
const Index& block_size() { return block_dim; }
const Index& grid_size() { return grid_dim; }

void wait_for_block() { sleep_as(State::AT_BARRIER); }
void let_others_run() { sleep_as(State::READY); }

Met meet(Meeting kind, uint32_t mask, uint64_t value, int source, bool predicate) {
    if (!(mask >> lane() & 1u)) fail("a warp collective's mask leaves out the calling lane");
    current->meeting = kind;
    current->mask = mask;
    current->value = value;
    current->source = source;
    current->predicate = predicate;
    Fibre* self = current;
    sleep_as(State::IN_MEETING);
    return self->met;
}

void* shared_array(const void* key, size_t bytes) {
    for (const SharedArray& array : shared_arrays) {
        if (array.key == key) return array.memory;
    }
    shared_used += bytes;
    if (shared_used > shared_limit) fail("more shared memory than a block may have");
    shared_arrays.push_back({key, filled(bytes), bytes});
    return shared_arrays.back().memory;
}
void* dynamic_shared() { return dynamic_memory; }

int allow_shared(const void* kernel, size_t bytes) {
    if (bytes > SHARED_LIMIT) return INVALID_VALUE;
    consents[kernel] = bytes;
    return 0;
}

int launch(Grid grid, Grid block, size_t shared_bytes, const void* kernel, const std::function<void()>& body) {
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > MOST_THREADS || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 ||
        grid.z > 65535 || grid.x > 0x7fffffffu) {
        return INVALID_CONFIGURATION;
    }
    const size_t consent = consents.count(kernel) ? consents[kernel] : 0;
    if (shared_bytes > std::max(SHARED_WITHOUT_CONSENT, consent)) return INVALID_VALUE;
    shared_limit = shared_bytes > SHARED_WITHOUT_CONSENT ? SHARED_LIMIT : SHARED_WITHOUT_CONSENT;
    n_threads = static_cast<unsigned>(threads);
    block_dim = {block.x, block.y, block.z};
    grid_dim = {grid.x, grid.y, grid.z};
    kernel_body = &body;
    randomness.seed(schedule.seed);
    for (unsigned i : ordered(grid.x * grid.y * grid.z)) {
        block_at = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        shared_used = shared_bytes;
        dynamic_memory = filled(shared_bytes);
        run_block();
        release_shared();
    }
    current = nullptr;
    return 0;
}

}  // namespace executor
