// Asynchronous copies to threadgroup memory.

#pragma once

#include "../../common/access.h"
#include "words.h"

// start_copy(to, from): starts a copy of 16 bytes of an input, aligned to 16 bytes, to threadgroup
// memory. mark_copies() ends a group of copies. end_copies<LEFT>() waits for all groups of this
// thread but the last LEFT. In Metal, start_copy itself copies and waits. From an address that is
// not known to be aligned, nothing is copied.
template <typename P>
FUNCTION void start_copy(threadgroup uint4*, P) {}

template <typename T>
FUNCTION void start_copy(threadgroup uint4* to, AlignedAddress<const device T*> from) {
    *to = *(const device uint4*)from.p;
}
FUNCTION void mark_copies() {}
template <int LEFT>
FUNCTION void end_copies() {}
