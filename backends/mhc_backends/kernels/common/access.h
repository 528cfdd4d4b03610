// Where vectors may be loaded and stored: the policy that a body is compiled for, twice.

#pragma once

#include "dialect/words.h"

// An address at which whole vectors begin, so that load and store need not look: a branch there
// would have all wait that follows.
template <typename P>
struct AlignedAddress {
    P p;
    FUNCTION AlignedAddress operator+(int64_t k) const { return {p + k}; }
    FUNCTION auto operator[](int64_t k) const -> decltype(p[k]) { return p[k]; }
};

// ACCESS is one of these: all of a kernel's arrays begin where vectors may, as its `..._aligned`
// found; or load and store ask each address.
struct Aligned {
    template <typename P>
    static FUNCTION AlignedAddress<P> at(P p) {
        return {p};
    }
};
struct Anywhere {
    template <typename P>
    static FUNCTION P at(P p) {
        return p;
    }
};

// Whether an address is known to be aligned.
template <typename P>
struct Address {
    enum { ALIGNED = 0 };
};
template <typename P>
struct Address<AlignedAddress<P>> {
    enum { ALIGNED = 1 };
};
