// Asynchronous copies to threadgroup memory.

#pragma once

#include "../../common/access.h"
#include "words.h"

// start_copy(to, from): starts a copy of 16 bytes of an input, aligned to 16 bytes, to threadgroup
// memory. mark_copies() ends a group of copies. end_copies<LEFT>() waits for all groups of this
// thread but the last LEFT. A copy in flight needs no registers and no place in the L1 cache, where
// rows a power of two apart would evict each other. From an address that is not known to be
// aligned, nothing is copied.
template <typename P>
FUNCTION void start_copy(uint4*, P) {}

template <typename P>
FUNCTION void start_copy(uint4* to, AlignedAddress<P> from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from.p))
                 : "memory");
}

FUNCTION void mark_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
FUNCTION void end_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
