// The threads of a threadgroup, their barriers and simd operations, and the launch of a grid.
#pragma once
#include "fiber.h"

enum State : u8 { READY, AT_BARRIER, AT_SIMD, FINISHED };

// The place where a thread waits: the operation, and its line and column in the source.
struct Site {
    u32 operation, line, column;
    bool operator==(const Site& o) const {
        return operation == o.operation && line == o.line && column == o.column;
    }
};

enum : u32 { OPERATION_BARRIER, OPERATION_SIMD_BARRIER, OPERATION_EXCHANGE };
enum : u32 { MEM_DEVICE = 1, MEM_THREADGROUP = 2 };
enum : u32 { DEVICE = 0, THREADGROUP = 1 };  // the two kinds of memory that barriers order

struct Fiber {
    void* stack;
    State state;
    u32 flags;
    Site site;
};

enum : u32 { EXCHANGE_BYTES = 64 };

// The values that the lanes of a simdgroup exchange in one operation.
struct Exchange {
    alignas(64) u8 value[SIMD_WIDTH][EXCHANGE_BYTES];
    alignas(64) u8 result[EXCHANGE_BYTES];
    u32 lanes, ready;
};

// Two exchanges take turns: a lane may enter the next operation while others still read this one,
// but none enters the one after that before all have left this one.
struct Simdgroup {
    u32 lanes, waiting, turn;
    u32 epoch[2];
    Exchange exchange[2];
};

static struct Machine {
    Launch* launch;
    void* scheduler;
    Fiber fibers[MAX_THREADS];
    Simdgroup simdgroups[MAX_SIMDGROUPS];
    u32 threads, waiting, current;
    u32 size[3], group[3], groups[3];  // of this threadgroup, its position, how many there are
    u32 epoch[2], first_epoch[2];      // ordered by barriers; the first of this threadgroup
    u32 order[MAX_THREADS];
    u32 random;
    u8* buffers[64];
} m;

MHC_INTERNAL void mhc_kernel_entry(u8* const* buffers);

static u32 simdgroup_of(u32 thread) { return thread / SIMD_WIDTH; }

// ---- faults ------------------------------------------------------------------------------------

static Fault& new_fault(FaultKind kind, u32 thread) {
    Fault& fault = m.launch->fault;
    fault.kind = kind;
    fault.thread = thread;
    fault.other = NOBODY;
    for (int i = 0; i < 3; i++) fault.group[i] = m.group[i];
    return fault;
}

// Leaves the faulty thread for good; the scheduler then ends the launch.
[[noreturn]] static void stop() {
    mhc_switch(&m.fibers[m.current].stack, m.scheduler);
    __builtin_unreachable();
}

// ---- waiting -----------------------------------------------------------------------------------

static void wait(State state, Site site, u32 flags) {
    Fiber& fiber = m.fibers[m.current];
    fiber.state = state;
    fiber.site = site;
    fiber.flags = flags;
    mhc_switch(&fiber.stack, m.scheduler);
}

static bool divergence(u32 thread, u32 other) {
    const Fiber &here = m.fibers[thread], &there = m.fibers[other];
    Fault& fault = new_fault(DIVERGENCE, thread);
    fault.other = other;
    fault.size = here.site.operation;
    fault.line = here.site.line;
    fault.column = here.site.column;
    fault.other_line = there.site.line;
    fault.other_finished = there.state == FINISHED;
    return false;
}

// Lets `count` threads from `first` on continue, if all of them wait at the same place.
static bool release(u32 first, u32 count, u32* epochs) {
    u32 flags = ~0u;
    for (u32 i = first; i < first + count; i++) {
        if (!(m.fibers[i].site == m.fibers[first].site)) return divergence(first, i);
        flags &= m.fibers[i].flags;
    }
    for (u32 i = first; i < first + count; i++) m.fibers[i].state = READY;
    if (flags & MEM_DEVICE) epochs[DEVICE]++;
    if (flags & MEM_THREADGROUP) epochs[THREADGROUP]++;
    return true;
}

// Called when a thread stops: checks whether the threads that it waits for wait too.
static bool arrive(u32 thread) {
    const Fiber& fiber = m.fibers[thread];
    Simdgroup& simdgroup = m.simdgroups[simdgroup_of(thread)];
    if (fiber.state == AT_BARRIER && ++m.waiting == m.threads) {
        m.waiting = 0;
        return release(0, m.threads, m.epoch);
    }
    if (fiber.state == AT_SIMD && ++simdgroup.waiting == simdgroup.lanes) {
        simdgroup.waiting = 0;
        return release(thread - thread % SIMD_WIDTH, simdgroup.lanes, simdgroup.epoch);
    }
    return true;
}

// No thread can continue: names a thread that waits, and one that it waits for in vain.
static bool stuck() {
    for (u32 i = 0; i < m.threads; i++) {
        const State state = m.fibers[i].state;
        if (state != AT_BARRIER && state != AT_SIMD) continue;
        const u32 first = state == AT_SIMD ? i - i % SIMD_WIDTH : 0;
        const u32 count = state == AT_SIMD ? m.simdgroups[simdgroup_of(i)].lanes : m.threads;
        for (u32 j = first; j < first + count; j++)
            if (m.fibers[j].state != state) return divergence(i, j);
    }
    return false;
}

// ---- one threadgroup ---------------------------------------------------------------------------

MHC_INTERNAL void mhc_fiber_start() {
    mhc_kernel_entry(m.buffers);
    wait(FINISHED, {}, 0);
    __builtin_unreachable();
}

static u32 random_below(u32 bound) {
    m.random ^= m.random << 13;
    m.random ^= m.random >> 17;
    m.random ^= m.random << 5;
    return m.random % bound;
}

static void shuffle() {
    for (u32 i = m.threads - 1; i > 0; i--) {
        const u32 j = random_below(i + 1), kept = m.order[i];
        m.order[i] = m.order[j];
        m.order[j] = kept;
    }
}

static void set_up_group() {
    m.threads = m.size[0] * m.size[1] * m.size[2];
    m.waiting = 0;
    for (int k = 0; k < 2; k++) m.first_epoch[k] = ++m.epoch[k];
    for (u32 i = 0; i < m.threads; i++) {
        m.order[i] = m.launch->order == 1 ? m.threads - 1 - i : i;
        // Staggered, or the frames of all fibers would share the same few cache lines' sets.
        u8* top = m.launch->stacks + (i + 1) * m.launch->stack_size - (i & 15) * 192;
        m.fibers[i] = {new_fiber(top), READY, 0, {}};
    }
    for (u32 s = 0; s * SIMD_WIDTH < m.threads; s++) {
        const u32 rest = m.threads - s * SIMD_WIDTH;
        m.simdgroups[s].lanes = rest < SIMD_WIDTH ? rest : SIMD_WIDTH;
        m.simdgroups[s].waiting = m.simdgroups[s].turn = 0;
    }
}

static bool run_group() {
    set_up_group();
    u32 finished = 0;
    while (finished < m.threads) {
        bool progress = false;
        if (m.launch->order == 2) shuffle();
        for (u32 k = 0; k < m.threads; k++) {
            const u32 thread = m.order[k];
            Fiber& fiber = m.fibers[thread];
            if (fiber.state != READY) continue;
            m.current = thread;
            mhc_switch(&m.scheduler, fiber.stack);
            if (m.launch->fault.kind != NO_FAULT || !arrive(thread)) return false;
            finished += fiber.state == FINISHED;
            progress = true;
        }
        if (!progress) return stuck();
    }
    return true;
}

// ---- the grid ----------------------------------------------------------------------------------

static u64 common_divisor(u64 a, u64 b) { return b ? common_divisor(b, a % b) : a; }

// The k-th threadgroup to run; the random order is a walk with a stride that visits each once.
static u64 group_at(u64 k, u64 count, u64 stride) {
    if (m.launch->order == 1) return count - 1 - k;
    return m.launch->order == 2 ? (k * stride + m.launch->seed) % count : k;
}

static bool run_grid() {
    u64 count = 1;
    for (int i = 0; i < 3; i++) {
        m.groups[i] = (m.launch->grid[i] + m.launch->group[i] - 1) / m.launch->group[i];
        count *= m.groups[i];
    }
    m.random = m.launch->seed * 2654435769u + 1;
    u64 stride = count / 2 + random_below(count) + 1;
    while (common_divisor(stride, count) != 1) stride++;
    for (u64 k = 0; k < count; k++) {
        u64 index = group_at(k, count, stride);
        for (int i = 0; i < 3; i++) {
            m.group[i] = index % m.groups[i];
            index /= m.groups[i];
            const u32 rest = m.launch->grid[i] - m.group[i] * m.launch->group[i];
            m.size[i] = rest < m.launch->group[i] ? rest : m.launch->group[i];
        }
        if (!run_group()) return false;
    }
    return true;
}

// ---- what the shim of metal_stdlib calls -------------------------------------------------------

MHC_INTERNAL void mhc_threadgroup_barrier(u32 flags, u32 line, u32 column) {
    wait(AT_BARRIER, {OPERATION_BARRIER, line, column}, flags);
}

MHC_INTERNAL void mhc_simdgroup_barrier(u32 flags, u32 line, u32 column) {
    wait(AT_SIMD, {OPERATION_SIMD_BARRIER, line, column}, flags);
}

MHC_INTERNAL Exchange* mhc_simd_exchange(const void* value, u32 size, u32 line, u32 column) {
    Simdgroup& simdgroup = m.simdgroups[simdgroup_of(m.current)];
    Exchange& exchange = simdgroup.exchange[simdgroup.turn & 1];
    __builtin_memcpy(exchange.value[m.current % SIMD_WIDTH], value, size);
    exchange.ready = 0;
    exchange.lanes = simdgroup.lanes;
    wait(AT_SIMD, {OPERATION_EXCHANGE, line, column}, 0);
    // The first lane that continues opens the other exchange for the next operation.
    if (&exchange == &simdgroup.exchange[simdgroup.turn & 1]) simdgroup.turn++;
    return &exchange;
}

MHC_INTERNAL void mhc_missing_lane(u32 lane, u32 line, u32 column) {
    Fault& fault = new_fault(MISSING_LANE, m.current);
    fault.size = lane;
    fault.line = line;
    fault.column = column;
    stop();
}

MHC_INTERNAL void mhc_mark(u32 branch, u32 bits) { m.launch->marks[branch] |= bits; }

// A loop's step, and its condition, between which no other thread comes.
static bool next_turn;
MHC_INTERNAL void mhc_next_turn() { next_turn = true; }
MHC_INTERNAL void mhc_mark_loop(u32 branch, bool enters) {
    mhc_mark(branch, enters ? (next_turn ? 5 : 1) : 2);
    next_turn = false;
}

MHC_INTERNAL u32 mhc_lane() { return m.current % SIMD_WIDTH; }

struct Position {
    u32 x, y, z;
};

static Position position(const u32* v) { return {v[0], v[1], v[2]}; }

static Position thread_in_group() {
    const u32 row = m.current / m.size[0];
    return {m.current % m.size[0], row % m.size[1], row / m.size[1]};
}

static Position thread_in_grid() {
    const Position p = thread_in_group();
    const u32* g = m.launch->group;
    return {m.group[0] * g[0] + p.x, m.group[1] * g[1] + p.y, m.group[2] * g[2] + p.z};
}

static u32 dispatched() { return m.launch->group[0] * m.launch->group[1] * m.launch->group[2]; }

static Position groups_of(u32 width, u32 threads) { return {(threads + width - 1) / width, 1, 1}; }

// The built-in kernel arguments, numbered as in the list that source.py keeps.
MHC_INTERNAL void mhc_attribute(u32 which, Position* out) {
    switch (which) {
        case 0: *out = groups_of(4, dispatched()); return;
        case 1: *out = groups_of(SIMD_WIDTH, dispatched()); return;
        case 2: *out = position(m.launch->group); return;
        case 3: *out = {0, 0, 0}; return;
        case 4: *out = position(m.launch->grid); return;
        case 5: *out = {m.current / 4, 0, 0}; return;
        case 6: *out = groups_of(4, m.threads); return;
        case 7: *out = {simdgroup_of(m.current), 0, 0}; return;
        case 8: *out = groups_of(SIMD_WIDTH, m.threads); return;
        case 9: *out = {SIMD_WIDTH, 0, 0}; return;
        case 10: *out = {m.current % 4, 0, 0}; return;
        case 11: *out = {m.current % SIMD_WIDTH, 0, 0}; return;
        case 12: *out = {m.current, 0, 0}; return;
        case 13: *out = thread_in_grid(); return;
        case 14: *out = thread_in_group(); return;
        case 15: *out = position(m.group); return;
        case 16: *out = position(m.groups); return;
        case 17: *out = position(m.launch->grid); return;
        case 18: *out = {SIMD_WIDTH, 0, 0}; return;
        default: *out = position(m.size);
    }
}
