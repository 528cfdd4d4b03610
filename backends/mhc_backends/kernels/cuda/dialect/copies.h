// Copies to threadgroup memory that are under way while a thread does something else.

#pragma once

#include "../../common/access.h"
#include "words.h"

// start_copy(to, from): begins to copy 16 bytes of an input, which begin at a multiple of 16, to
// threadgroup memory. end_copies<LEFT>() waits for this thread's, but for those of the last LEFT
// times that it said mark_copies(). Until then a row on its way needs no registers, nor a place in
// the cache, where rows that lie a power of two apart would drive out each other. Nothing is copied
// from what is not aligned.
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
