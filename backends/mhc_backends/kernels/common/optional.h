// An output that a launch may leave out.

#pragma once

#include "floats.h"
#include "store.h"
#include "dialect/vectors.h"
#include "dialect/words.h"

// Stores W numbers at a time to an output that the launch has if THERE.
template <bool THERE, int W>
struct Optional {
    template <typename P>
    static FUNCTION bool by_vectors(P p) {
        return vectors<W>(p);
    }
    template <typename P>
    static FUNCTION void put(P p, Floats<W> v) {
        store(p, v);
    }
};
template <int W>
struct Optional<false, W> {
    template <typename P>
    static FUNCTION bool by_vectors(P) {
        return true;
    }
    template <typename P>
    static FUNCTION void put(P, Floats<W>) {}
};
