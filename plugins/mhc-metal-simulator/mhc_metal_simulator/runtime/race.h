// Whether two accesses to one place are ordered. A Cell keeps the latest accesses.
//
// Epochs count the barriers that ordered a kind of memory: one counter for the threadgroup, one
// per simdgroup. Accesses of two threads conflict when one writes and neither counter has moved
// between them (the simdgroup's counts only between two of its own threads).
//
// Two readers suffice, one of them from another simdgroup where there is one: a writer always
// differs from one of them, and a simdgroup's barrier never orders it against the other.
#pragma once
#include "schedule.h"

struct Access {
    u32 thread, epoch, first_epoch, simd_epoch;
};

static Access access_now(u32 kind) {
    const u32 s = simdgroup_of(m.current);
    return {m.current, m.epoch[kind], m.first_epoch[kind], m.simdgroups[s].epoch[kind]};
}

static bool conflicts(const Access& now, u32 thread, u32 simd_epoch) {
    if (thread == now.thread || thread == NOBODY) return false;
    return simdgroup_of(thread) != simdgroup_of(now.thread) || simd_epoch >= now.simd_epoch;
}

// Replaces the other thread of a race; NOBODY means one of another threadgroup.
enum : u32 { NO_RACE = 0x10000 };

static u32 race_with_write(const Cell& cell, const Access& now) {
    if (cell.write_epoch == 0) return NO_RACE;
    if (cell.write_epoch < now.first_epoch) return NOBODY;
    if (cell.write_epoch < now.epoch) return NO_RACE;
    return conflicts(now, cell.writer, cell.write_simd_epoch) ? cell.writer : NO_RACE;
}

static u32 race_with_read(const Cell& cell, const Access& now) {
    if (cell.read_before) return NOBODY;
    if (cell.read_epoch == 0) return NO_RACE;
    if (cell.read_epoch < now.first_epoch) return NOBODY;
    if (cell.read_epoch < now.epoch) return NO_RACE;
    if (conflicts(now, cell.reader, cell.read_simd_epoch)) return cell.reader;
    if (conflicts(now, cell.other_reader, cell.read_simd_epoch)) return cell.other_reader;
    return NO_RACE;
}

static void record_write(Cell& cell, const Access& now) {
    cell.write_epoch = now.epoch;
    cell.write_simd_epoch = now.simd_epoch;
    cell.writer = now.thread;
}

static void record_read(Cell& cell, const Access& now) {
    if (cell.read_epoch && cell.read_epoch < now.first_epoch) cell.read_before = 1;
    const bool same = cell.read_epoch == now.epoch;
    if (same && simdgroup_of(cell.reader) != simdgroup_of(now.thread)) {
        cell.other_reader = now.thread;
        return;
    }
    if (same && cell.read_simd_epoch == now.simd_epoch) {
        if (cell.reader != now.thread && cell.other_reader == NOBODY)
            cell.other_reader = now.thread;
        return;
    }
    // Older reads of this simdgroup are ordered; those of another one in `other_reader` are not.
    const bool keep = same && cell.other_reader != NOBODY &&
                      simdgroup_of(cell.other_reader) != simdgroup_of(now.thread);
    cell.read_epoch = now.epoch;
    cell.read_simd_epoch = now.simd_epoch;
    cell.reader = now.thread;
    if (!keep) cell.other_reader = NOBODY;
}
