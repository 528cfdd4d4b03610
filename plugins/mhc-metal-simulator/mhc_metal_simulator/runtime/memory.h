// Checks before every load and store of the kernel: bounds, races, unwritten memory, counts.
#pragma once
#include "race.h"

// ---- threadgroup memory ------------------------------------------------------------------------

// Arrays have gaps between them, so that an overrun of one is not an access to the next.
enum : u64 { SHARED_GAP = 256, SHARED_ROOM = 96 * 1024, MAX_SHARED = 128 };

static u8 shared_memory[SHARED_ROOM] __attribute__((aligned(256)));
static Cell shared_cells[SHARED_ROOM];
static SharedArray shared_arrays[MAX_SHARED];
static u32 shared_count;
static u64 shared_end = SHARED_GAP;

// Called while the library is loaded. Arrays that do not fit are refused before any launch.
MHC_INTERNAL u8* mhc_shared(const char* name, u64 size) {
    if (shared_count == MAX_SHARED) return shared_memory;
    shared_arrays[shared_count++] = {name, size, shared_end};
    u8* memory = shared_memory + shared_end;
    shared_end += (size + SHARED_GAP + 255) & ~255ull;
    return memory;
}

MHC_EXPORT const SharedArray* mhc_shared_arrays(u64* count) {
    *count = shared_count;
    return shared_arrays;
}

// ---- finding the array of an address -----------------------------------------------------------

struct Location {
    Space space;
    u32 array;
    i64 offset;
    u64 size;
};

static Location location_in_shared(u64 at) {
    u32 i = 0;
    while (i + 1 < shared_count && shared_arrays[i + 1].offset - SHARED_GAP / 2 <= at) i++;
    return {SPACE_THREADGROUP, i, i64(at - shared_arrays[i].offset), shared_arrays[i].size};
}

static Location location_of(u64 address) {
    const u64 in_arena = address - (u64)m.launch->arena;
    if (in_arena < m.launch->arena_size) {
        const u32 i = m.launch->page_owner[in_arena >> 12];
        const Buffer& buffer = m.launch->buffers[i];
        return {SPACE_BUFFER, i, i64(address - (u64)buffer.data), buffer.size};
    }
    const u64 in_shared = address - (u64)shared_memory;
    if (in_shared < SHARED_ROOM && shared_count) return location_in_shared(in_shared);
    return {SPACE_NONE, 0, i64(address), 0};
}

// ---- faults ------------------------------------------------------------------------------------

MHC_INTERNAL char __ehdr_start[], _end[];

[[noreturn]] static void memory_fault(FaultKind kind, const Location& where, u32 size, bool write,
                                      u64 caller, u32 other = NOBODY, bool other_write = false) {
    Fault& fault = new_fault(kind, m.current);
    fault.space = where.space;
    fault.array = where.array;
    fault.offset = where.offset;
    fault.size = size;
    fault.write = write;
    fault.other = other;
    fault.other_write = other_write;
    fault.address = caller - (u64)__ehdr_start;
    stop();
}

static void check_races(Cell& cell, const Access& now, const Location& where, u32 size, bool write,
                        u64 caller) {
    u32 other = race_with_write(cell, now);
    if (other != NO_RACE) memory_fault(RACE, where, size, write, caller, other, true);
    if (!write) return record_read(cell, now);
    other = race_with_read(cell, now);
    if (other != NO_RACE) memory_fault(RACE, where, size, write, caller, other, false);
    record_write(cell, now);
}

// ---- one access --------------------------------------------------------------------------------

static u64 mask_of(u64 bits) { return bits >= 64 ? ~0ull : (1ull << bits) - 1; }

static bool all_set(const u64* bits, u64 at, u64 count) {
    while (count) {
        const u64 room = 64 - (at & 63), n = count < room ? count : room;
        const u64 mask = mask_of(n) << (at & 63);
        if ((bits[at >> 6] & mask) != mask) return false;
        at += n;
        count -= n;
    }
    return true;
}

static void set_bits(u64* bits, u64 at, u64 count) {
    while (count) {
        const u64 room = 64 - (at & 63), n = count < room ? count : room;
        bits[at >> 6] |= mask_of(n) << (at & 63);
        at += n;
        count -= n;
    }
}

static void buffer_access(const Location& where, u32 size, bool write, bool atomic, u64 caller) {
    Buffer& buffer = m.launch->buffers[where.array];
    if (write && !buffer.writable) memory_fault(INPUT_WRITTEN, where, size, write, caller);
    if (!write && !buffer.initialised && !all_set(buffer.stored_bits, where.offset, size))
        memory_fault(UNWRITTEN_READ, where, size, write, caller);
    if (buffer.writable && !atomic) {
        const Access now = access_now(DEVICE);
        const u64 last = (where.offset + size - 1) >> buffer.element_shift;
        for (u64 i = where.offset >> buffer.element_shift; i <= last; i++)
            check_races(buffer.cells[i], now, where, size, write, caller);
    }
    set_bits(write ? buffer.stored_bits : buffer.loaded_bits, where.offset, size);
    (write ? buffer.stored : buffer.loaded) += size;
}

static void shared_access(const Location& where, u32 size, bool write, bool atomic, u64 caller) {
    const Access now = access_now(THREADGROUP);
    Cell* cells = shared_cells + shared_arrays[where.array].offset + where.offset;
    for (u32 i = 0; i < size; i++) {
        Cell& cell = cells[i];
        // Cells of earlier threadgroups are stale, not in conflict: each group has its own memory.
        if (cell.write_epoch < now.first_epoch && cell.read_epoch < now.first_epoch)
            cell = {0, 0, 0, 0, 0, NOBODY, NOBODY, 0};
        if (!write && cell.write_epoch == 0)
            memory_fault(UNWRITTEN_READ, where, size, write, caller);
        if (atomic && write)
            record_write(cell, now);
        else if (!atomic)
            check_races(cell, now, where, size, write, caller);
    }
}

static bool is_private(u64 address) {
    const u64 stacks = (u64)m.launch->stacks, all = m.launch->stack_size * MAX_THREADS;
    return address - stacks < all || address - (u64)__ehdr_start < u64(_end - __ehdr_start);
}

static void check_access(u64 address, u64 size, bool write, u64 caller, bool atomic = false) {
    if (!m.launch) return;  // the library is being loaded
    const Location where = location_of(address);
    if (where.space == SPACE_NONE) {
        if (!is_private(address)) memory_fault(WILD_ACCESS, where, size, write, caller);
        return;
    }
    if (where.offset < 0 || u64(where.offset) + size > where.size)
        memory_fault(OUT_OF_BOUNDS, where, size, write, caller);
    if (where.space == SPACE_BUFFER) return buffer_access(where, size, write, atomic, caller);
    return shared_access(where, size, write, atomic, caller);
}

static void check_aligned(u64 address, u32 size, bool write, u64 caller) {
    if (address % size && m.launch)
        memory_fault(MISALIGNED, location_of(address), size, write, caller);
    check_access(address, size, write, caller);
}

// Before each atomic operation, which is ordered against all others and so never races.
MHC_INTERNAL void mhc_atomic_access(u64 address, u64 size, u32 read, u32 write, u32 line,
                                    u32 column) {
    m.launch->fault.line = line;  // counts only if a fault follows
    m.launch->fault.column = column;
    if (address % size) memory_fault(MISALIGNED, location_of(address), size, write, 0);
    if (read) check_access(address, size, false, 0, true);
    if (write) check_access(address, size, true, 0, true);
    m.launch->fault.line = m.launch->fault.column = 0;
}

// ---- the calls that clang puts before loads and stores (-fsanitize=kernel-address) --------------

// The name ends in the size if the type's alignment is its size, else in N.
#define CALLER ((u64)__builtin_return_address(0))
#define MHC_SIZED(n)                                                                             \
    MHC_INTERNAL void __asan_load##n##_noabort(u64 at) { check_aligned(at, n, false, CALLER); } \
    MHC_INTERNAL void __asan_store##n##_noabort(u64 at) { check_aligned(at, n, true, CALLER); }
MHC_SIZED(1)
MHC_SIZED(2)
MHC_SIZED(4)
MHC_SIZED(8)
MHC_SIZED(16)
#undef MHC_SIZED

MHC_INTERNAL void __asan_loadN_noabort(u64 at, u64 n) { check_access(at, n, false, CALLER); }
MHC_INTERNAL void __asan_storeN_noabort(u64 at, u64 n) { check_access(at, n, true, CALLER); }
MHC_INTERNAL void __asan_handle_no_return() {}

MHC_INTERNAL void* __asan_memcpy(void* to, const void* from, u64 n) {
    if (n) check_access((u64)from, n, false, CALLER), check_access((u64)to, n, true, CALLER);
    return __builtin_memcpy(to, from, n);
}
MHC_INTERNAL void* __asan_memmove(void* to, const void* from, u64 n) {
    if (n) check_access((u64)from, n, false, CALLER), check_access((u64)to, n, true, CALLER);
    return __builtin_memmove(to, from, n);
}
MHC_INTERNAL void* __asan_memset(void* to, int value, u64 n) {
    if (n) check_access((u64)to, n, true, CALLER);
    return __builtin_memset(to, value, n);
}
