// Iterations in one of two spaces. LinearSpace keeps the matrix's entries and divides them by their
// sums. LogSpace keeps half the logarithm of each entry, so that no line can underflow to 0 / 0 and
// the difference of two finite entries is finite. In both, dividing a line has a divisor: `scaled`
// with this divisor undoes the division, and the divisor `nothing` changes no entry.

#pragma once

#include "../floats.h"
#include "../held.h"
#include "../position.h"
#include "lanes.h"
#include "sums.h"
#include "dialect/infinity.h"
#include "dialect/precise.h"
#include "dialect/reciprocal.h"
#include "dialect/words.h"

template <typename SPACE, int N>
FUNCTION Floats<N> scale_a(Floats<N> v, float factor) {
    UNROLL for (int a = 0; a < N; a++)
        v.at[a] = SPACE::scaled(v.at[a], factor);
    return v;
}

// Scales along b; lane a has the factor of the line at a.
template <typename SPACE, int N>
FUNCTION Floats<N> scale_b(Floats<N> v, float factor, Position here) {
    const Floats<N> factors = of_lanes<N>(factor, here);
    UNROLL for (int a = 0; a < N; a++)
        v.at[a] = SPACE::scaled(v.at[a], factors.at[a]);
    return v;
}

template <typename SPACE, int N>
FUNCTION Floats<N> values(Floats<N> v) {
    UNROLL for (int a = 0; a < N; a++)
        v.at[a] = SPACE::value(v.at[a]);
    return v;
}

// A matrix after a division. Along a, the divisor is that of this lane's line; along b, that of the
// line at this lane's own place along a.
template <int N>
struct Divided {
    Floats<N> v;
    float divisor;
};

struct LinearSpace {
    static FUNCTION float nothing() { return 1.0f; }
    static FUNCTION float inverse(float divisor) { return reciprocal(divisor); }
    static FUNCTION float scaled(float v, float factor) { return v * factor; }
    static FUNCTION float value(float v) { return v; }

    template <int N>
    static FUNCTION Divided<N> divide_a(Floats<N> v, float eps, bool active) {
        Divided<N> out;
        out.divisor = active ? sum_a(v) + eps : nothing();
        out.v = scale_a<LinearSpace>(v, inverse(out.divisor));
        return out;
    }
    template <int N>
    static FUNCTION Divided<N> divide_b(Floats<N> v, float eps, bool active, Position here) {
        Divided<N> out;
        out.divisor = nothing();
        if (Lanes<N>::FEW) {
            const Floats<N> sums = sums_b(v, here);
            UNROLL for (int a = 0; a < N; a++) {
                const float divisor = active ? sums.at[a] + eps : nothing();
                out.v.at[a] = v.at[a] * inverse(divisor);
                if (a == line<N>(here)) out.divisor = divisor;
            }
        } else {
            const float sum = over_lines<Plus>(v, 0.0f, here);
            if (active) out.divisor = sum + eps;
            out.v = scale_b<LinearSpace>(v, inverse(out.divisor), here);
        }
        return out;
    }
};

struct LogSpace {
    static FUNCTION float nothing() { return 0.0f; }
    static FUNCTION float inverse(float divisor) { return -divisor; }
    static FUNCTION float scaled(float v, float factor) { return v + factor; }
    static FUNCTION float value(float v) { return precise::exp(v + v); }

    // A divisor is the sum of a shift and a logarithm. A `far` shift is subtracted separately:
    // added first, it would round the logarithm away. Where that happens in the divisor, the entry
    // that the divisor restores has an exp of 0.
    static FUNCTION float far(float shift) { return fabs(shift) > 1.0f ? shift : nothing(); }

    template <int N>
    static FUNCTION Divided<N> divide_a(Floats<N> v, float, bool active) {
        const float shift = active ? largest_a(v) : nothing(), near = shift - far(shift);
        v = scale_a<LogSpace>(v, -far(shift));
        const float sum = sum_a(values<LogSpace>(scale_a<LogSpace>(v, -near)));
        const float rest = active ? near + 0.5f * precise::log(sum) : nothing();
        Divided<N> out;
        out.divisor = far(shift) + rest;
        out.v = scale_a<LogSpace>(v, -rest);
        return out;
    }
    template <int N>
    static FUNCTION Divided<N> divide_b(Floats<N> v, float, bool active, Position here) {
        const float largest = over_lines<Larger>(v, MINUS_INFINITY, here);
        const float shift = active ? largest : nothing(), near = shift - far(shift);
        v = scale_b<LogSpace>(v, -far(shift), here);
        const Floats<N> below = scale_b<LogSpace>(v, -near, here);
        const float sum = over_lines<Plus>(values<LogSpace>(below), 0.0f, here);
        const float rest = active ? near + 0.5f * precise::log(sum) : nothing();
        Divided<N> out;
        out.divisor = far(shift) + rest;
        out.v = scale_b<LogSpace>(v, -rest, here);
        return out;
    }
};

// One iteration and its two divisors. A matrix that is not `active` stays unchanged.
template <int N>
struct Step {
    Floats<N> v;
    float a, b;
};

template <typename SPACE, int N>
FUNCTION Step<N> iterate(Floats<N> v, float eps, bool active, Position here) {
    Step<N> out;
    const Divided<N> along_a = SPACE::divide_a(v, eps, active && inside<N>(here));
    const Divided<N> along_b = SPACE::divide_b(along_a.v, eps, active, here);
    out.v = along_b.v, out.a = along_a.divisor, out.b = along_b.divisor;
    return out;
}
