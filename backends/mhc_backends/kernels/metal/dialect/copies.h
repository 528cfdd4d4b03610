// Copies to threadgroup memory that are under way while a thread does something else.

#pragma once

#include "../../common/access.h"
#include "words.h"

// start_copy(to, from): begins to copy 16 bytes of an input, which begin at a multiple of 16, to
// threadgroup memory. end_copies<LEFT>() waits for this thread's, but for those of the last LEFT
// times that it said mark_copies(). Here the first one waits. Nothing is copied from what is not
// aligned.
template <typename P>
FUNCTION void start_copy(threadgroup uint4*, P) {}

template <typename T>
FUNCTION void start_copy(threadgroup uint4* to, AlignedAddress<const device T*> from) {
    *to = *(const device uint4*)from.p;
}
FUNCTION void mark_copies() {}
template <int LEFT>
FUNCTION void end_copies() {}
