// The access policy: where vectors may be loaded and stored. A body is compiled for both policies.

#pragma once

#include "dialect/words.h"

// An address that is aligned for vectors, so that load and store need no branch: later loads would
// wait for it.
template <typename P>
struct AlignedAddress {
    P p;
    FUNCTION AlignedAddress operator+(int64_t k) const { return {p + k}; }
    FUNCTION auto operator[](int64_t k) const -> decltype(p[k]) { return p[k]; }
};

// ACCESS is one of these. Aligned: all arrays of the kernel begin at aligned addresses, as its
// `..._aligned` found. Anywhere: load and store check each address.
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
