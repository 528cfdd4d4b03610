// Sinkhorn's iterations on matrices that lie in the lanes of a simdgroup, as in
// mhc_core/math/sinkhorn.py: "a" is the axis that is normalised first, "b" the other one.
//
// A matrix takes Places<N>::COUNT lanes side by side: a simdgroup has MATRICES of them. Lane b of a
// matrix holds the N numbers of its line along a in registers. So a sum along a is the lane's own;
// of the N sums along b, lane a has number a. Lanes from N on are padding, which adds nothing to
// any sum. All 32 lanes must come to every function that takes `here`.

template <int N>
struct Places {
    enum {
        COUNT = N <= 1 ? 1 : N <= 2 ? 2 : N <= 4 ? 4 : N <= 8 ? 8 : N <= 16 ? 16 : 32,
        MATRICES = 32 / COUNT,  // of a simdgroup
        FEW = COUNT <= 4        // lanes: each can have every sum over them at once
    };
};

// b, and whether it is a line of the matrix.
template <int N>
FUNCTION int line(Place here) {
    return here.id % Places<N>::COUNT;
}
template <int N>
FUNCTION bool inside(Place here) {
    return N == Places<N>::COUNT || line<N>(here) < N;
}

// Where the number at (a, b) is in an [N, N] array, which holds H_res or its transpose.
template <int N, bool FIRST_COLUMNS, bool TRANSPOSED>
FUNCTION int entry(int a, int b) {
    return FIRST_COLUMNS != TRANSPOSED ? a * N + b : b * N + a;
}

FUNCTION Floats<1> one(float v) {
    Floats<1> out;
    out.at[0] = v;
    return out;
}

// A lane's line from and to such an array; zeros where there is none.
template <int N, bool FIRST_COLUMNS, bool TRANSPOSED, typename P>
FUNCTION Floats<N> load_line(P entries, bool there, Place here) {
    const int b = line<N>(here);
    if (!there || !inside<N>(here)) return zeros<N>();
    Floats<N> v;
    if (FIRST_COLUMNS == TRANSPOSED) {
        v = load<N>(entries + b * N);
    } else {
        UNROLL for (int a = 0; a < N; a++) v.at[a] = float(entries[a * N + b]);
    }
    return v;
}
template <int N, bool FIRST_COLUMNS, bool TRANSPOSED, typename P>
FUNCTION void store_line(P entries, Floats<N> v, bool there, Place here) {
    const int b = line<N>(here);
    if (!there || !inside<N>(here)) return;
    if (FIRST_COLUMNS == TRANSPOSED) {
        store(entries + b * N, v);
    } else {
        UNROLL for (int a = 0; a < N; a++) store(entries + a * N + b, one(v.at[a]));
    }
}

// A simdgroup takes MATRICES tokens side by side, its first ones from first_tokens on, then those
// that are next_tokens further on; this lane takes the one that is own_token further on than they.
// Of a threadgroup no more than SIMDGROUPS simdgroups take part; T tells the others that they are
// done.
template <int N, int SIMDGROUPS = MOST_SIMDGROUPS>
FUNCTION int64_t next_tokens(Place here) {
    const int simdgroups = here.threads / SIMD;
    const int64_t groups = here.groups_x;
    return groups * (simdgroups < SIMDGROUPS ? simdgroups : SIMDGROUPS) * Places<N>::MATRICES;
}
template <int N, int SIMDGROUPS = MOST_SIMDGROUPS>
FUNCTION int64_t first_tokens(int64_t T, Place here) {
    const int64_t simdgroup = here.id / SIMD;
    const int64_t each = next_tokens<N, SIMDGROUPS>(here) / here.groups_x;
    return simdgroup < SIMDGROUPS ? here.group_x * each + simdgroup * Places<N>::MATRICES : T;
}
template <int N>
FUNCTION int own_token(Place here) {
    return here.id % SIMD / Places<N>::COUNT;
}

// ---- along a: in a lane ------------------------------------------------------------------------

template <int N>
FUNCTION float sum_a(Floats<N> v) {
    Floats<4> parts = zeros<4>();  // which do not wait for each other
    UNROLL for (int a = 0; a < N; a++)
        parts.at[a % 4] = a < 4 ? v.at[a] : parts.at[a % 4] + v.at[a];
    return (parts.at[0] + parts.at[1]) + (parts.at[2] + parts.at[3]);
}
template <int N>
FUNCTION float largest_a(Floats<N> v) {
    float out = v.at[0];
    UNROLL for (int a = 1; a < N; a++) out = precise::max(out, v.at[a]);
    return out;
}
template <int N>
FUNCTION Floats<N> exps(Floats<N> v, float shift) {
    UNROLL for (int a = 0; a < N; a++) v.at[a] = precise::exp(v.at[a] - shift);
    return v;
}

// ---- along b: over the lanes of a matrix -------------------------------------------------------

struct Plus {
    static FUNCTION float of(float u, float v) { return u + v; }
};
struct Larger {
    static FUNCTION float of(float u, float v) { return precise::max(u, v); }
};

// Lane a gets v.at[a] of all lanes together: in each round lanes swap the halves that the others
// need, and half of the numbers are left.
template <typename OPERATION>
FUNCTION float fold(Floats<1> v, int) {
    return v.at[0];
}
template <typename OPERATION, int COUNT>
FUNCTION float fold(Floats<COUNT> v, int lane) {
    const bool upper = (lane & (COUNT / 2)) != 0;
    Floats<COUNT / 2> kept;
    UNROLL for (int a = 0; a < COUNT / 2; a++) {
        const float lower_one = v.at[a], upper_one = v.at[COUNT / 2 + a];
        const float other = simd_partner(upper ? lower_one : upper_one, COUNT / 2);
        kept.at[a] = OPERATION::of(upper ? upper_one : lower_one, other);
    }
    return fold<OPERATION>(kept, lane);
}
template <typename OPERATION, int N>
FUNCTION float over_lines(Floats<N> v, float nothing, Place here) {
    Floats<Places<N>::COUNT> padded;
    UNROLL for (int a = 0; a < Places<N>::COUNT; a++) padded.at[a] = a < N ? v.at[a] : nothing;
    return fold<OPERATION>(padded, here.id);
}

// The sum over the lanes of a matrix, of one number each, for all of them.
template <int N>
FUNCTION float sum_lines(float v, Place here) {
    if (!inside<N>(here)) v = 0.0f;
    for (int step = 1; step < Places<N>::COUNT; step *= 2) v += simd_partner(v, step);
    return v;
}

// What lane a has, for every a.
template <int N>
FUNCTION Floats<N> of_lanes(float v, Place here) {
    const int first = here.id % SIMD - line<N>(here);
    Floats<N> out;
    UNROLL for (int a = 0; a < N; a++) out.at[a] = simd_from(v, first + a);
    return out;
}

// The sums along b, all of them for every lane.
template <int N>
FUNCTION Floats<N> sums_b(Floats<N> v, Place here) {
    if (Places<N>::FEW) {
        UNROLL for (int a = 0; a < N; a++) {
            if (Places<N>::COUNT >= 2) v.at[a] += simd_partner(v.at[a], 1);
            if (Places<N>::COUNT >= 4) v.at[a] += simd_partner(v.at[a], 2);
        }
    } else {
        v = of_lanes<N>(over_lines<Plus>(v, 0.0f, here), here);
    }
    return v;
}

// ---- two ways to iterate -----------------------------------------------------------------------
// A matrix is kept as its numbers, divided by what the sums are; or as half of their logarithms, so
// that no line can underflow to 0 / 0, and the difference of any two finite ones is finite. Either
// way a line has a divisor: `scaled` with it undoes the division, and `nothing` is the one that
// changes no number.

template <typename KIND, int N>
FUNCTION Floats<N> scale_a(Floats<N> v, float factor) {
    UNROLL for (int a = 0; a < N; a++) v.at[a] = KIND::scaled(v.at[a], factor);
    return v;
}
// The factor of the line at a is lane a's.
template <typename KIND, int N>
FUNCTION Floats<N> scale_b(Floats<N> v, float factor, Place here) {
    const Floats<N> factors = of_lanes<N>(factor, here);
    UNROLL for (int a = 0; a < N; a++) v.at[a] = KIND::scaled(v.at[a], factors.at[a]);
    return v;
}

template <typename KIND, int N>
FUNCTION Floats<N> values(Floats<N> v) {
    UNROLL for (int a = 0; a < N; a++) v.at[a] = KIND::value(v.at[a]);
    return v;
}

// A matrix after a division: along a with the divisor of this lane's line, or along b with that at
// this lane's own place along a.
template <int N>
struct Divided {
    Floats<N> v;
    float divisor;
};

struct Numbers {
    static FUNCTION float nothing() { return 1.0f; }
    static FUNCTION float inverse(float divisor) { return reciprocal(divisor); }
    static FUNCTION float scaled(float v, float factor) { return v * factor; }
    static FUNCTION float value(float v) { return v; }

    template <int N>
    static FUNCTION Divided<N> divide_a(Floats<N> v, float eps, bool active) {
        Divided<N> out;
        out.divisor = active ? sum_a(v) + eps : nothing();
        out.v = scale_a<Numbers>(v, inverse(out.divisor));
        return out;
    }
    template <int N>
    static FUNCTION Divided<N> divide_b(Floats<N> v, float eps, bool active, Place here) {
        Divided<N> out;
        out.divisor = nothing();
        if (Places<N>::FEW) {
            const Floats<N> sums = sums_b(v, here);
            UNROLL for (int a = 0; a < N; a++) {
                const float divisor = active ? sums.at[a] + eps : nothing();
                out.v.at[a] = v.at[a] * inverse(divisor);
                if (a == line<N>(here)) out.divisor = divisor;
            }
        } else {
            const float sum = over_lines<Plus>(v, 0.0f, here);
            if (active) out.divisor = sum + eps;
            out.v = scale_b<Numbers>(v, inverse(out.divisor), here);
        }
        return out;
    }
};

struct Logarithms {
    static FUNCTION float nothing() { return 0.0f; }
    static FUNCTION float inverse(float divisor) { return -divisor; }
    static FUNCTION float scaled(float v, float factor) { return v + factor; }
    static FUNCTION float value(float v) { return precise::exp(v + v); }

    // A divisor is the shift and a logarithm. A shift that is `far` is taken away by itself: in a sum
    // it would round the logarithm away. Where it does so in the divisor, what that brings back has
    // an exp of 0.
    static FUNCTION float far(float shift) { return fabs(shift) > 1.0f ? shift : nothing(); }

    template <int N>
    static FUNCTION Divided<N> divide_a(Floats<N> v, float, bool active) {
        const float shift = active ? largest_a(v) : nothing(), near = shift - far(shift);
        v = scale_a<Logarithms>(v, -far(shift));
        const float sum = sum_a(values<Logarithms>(scale_a<Logarithms>(v, -near)));
        const float rest = active ? near + 0.5f * precise::log(sum) : nothing();
        Divided<N> out;
        out.divisor = far(shift) + rest;
        out.v = scale_a<Logarithms>(v, -rest);
        return out;
    }
    template <int N>
    static FUNCTION Divided<N> divide_b(Floats<N> v, float, bool active, Place here) {
        const float largest = over_lines<Larger>(v, MINUS_INFINITY, here);
        const float shift = active ? largest : nothing(), near = shift - far(shift);
        v = scale_b<Logarithms>(v, -far(shift), here);
        const Floats<N> below = scale_b<Logarithms>(v, -near, here);
        const float sum = over_lines<Plus>(values<Logarithms>(below), 0.0f, here);
        const float rest = active ? near + 0.5f * precise::log(sum) : nothing();
        Divided<N> out;
        out.divisor = far(shift) + rest;
        out.v = scale_b<Logarithms>(v, -rest, here);
        return out;
    }
};

// An iteration, and its two divisors. Matrices that are not `active` stay as they are.
template <int N>
struct Step {
    Floats<N> v;
    float a, b;
};
template <typename KIND, int N>
FUNCTION Step<N> iterate(Floats<N> v, float eps, bool active, Place here) {
    Step<N> out;
    const Divided<N> along_a = KIND::divide_a(v, eps, active && inside<N>(here));
    const Divided<N> along_b = KIND::divide_b(along_a.v, eps, active, here);
    out.v = along_b.v, out.a = along_a.divisor, out.b = along_b.divisor;
    return out;
}

// ---- and back ----------------------------------------------------------------------------------
// G = P g is the cotangent of log P. Each division's vjp is G -= P sum_a(G) along its axis.

template <typename KIND, int N>
FUNCTION Floats<N> pull_a(Floats<N> G, Floats<N> v, float sum) {
    UNROLL for (int a = 0; a < N; a++) G.at[a] = fma(-KIND::value(v.at[a]), sum, G.at[a]);
    return G;
}
template <typename KIND, int N>
FUNCTION Floats<N> pull_b(Floats<N> G, Floats<N> v, Floats<N> sums) {
    UNROLL for (int a = 0; a < N; a++) G.at[a] = fma(-KIND::value(v.at[a]), sums.at[a], G.at[a]);
    return G;
}

enum {
    SEGMENT = 20,                   // iterations whose divisors are kept at a time
    DIVISORS = 2 * SEGMENT * SIMD,  // floats of threadgroup memory that a simdgroup needs for them
    KEEPERS = 2                     // simdgroups that have it, of a threadgroup in the kernels here
};

// A simdgroup's own part of DIVISORS * KEEPERS floats.
template <typename S>
FUNCTION S own_divisors(S kept, Place here) {
    return kept + here.id / SIMD % KEEPERS * DIVISORS;
}

template <int N>
struct Pulled {
    Floats<N> G, v;
};
// Through the iterations that begin at `start`, for g the cotangent of their result: gives G and
// the matrix there. All matrices of the simdgroup took `most` iterations, or, if they are FROZEN,
// this lane's took `steps` of them. Beyond one segment the iterations are run again for each; a
// lane reads only what it wrote.
template <typename KIND, bool FROZEN, int N, typename S>
FUNCTION Pulled<N> pull_steps(Floats<N> start, Floats<N> g, int steps, int most, float eps, S kept,
                              Place here) {
    const int lane = here.id % SIMD;
    Pulled<N> out;
    int end = most;
    do {
        const int begin = end > SEGMENT ? end - SEGMENT : 0;
        out.v = start;
        for (int k = 0; k < end; k++) {
            const bool active = !FROZEN || k < steps;
            const Step<N> taken = iterate<KIND>(out.v, eps, active, here);
            out.v = taken.v;
            if (k >= begin) {
                kept[2 * (k - begin) * SIMD + lane] = taken.a;
                kept[(2 * (k - begin) + 1) * SIMD + lane] = taken.b;
            }
        }
        if (end == most) out.G = product(values<KIND>(out.v), g);
        for (int k = end - 1; k >= begin; k--) {
            const bool active = !FROZEN || k < steps;
            const Floats<N> sums = sums_b(out.G, here);
            if (active) out.G = pull_b<KIND>(out.G, out.v, sums);
            out.v = scale_b<KIND>(out.v, kept[(2 * (k - begin) + 1) * SIMD + lane], here);
            if (active) out.G = pull_a<KIND>(out.G, out.v, sum_a(out.G));
            out.v = scale_a<KIND>(out.v, kept[2 * (k - begin) * SIMD + lane]);
        }
        end = begin;
    } while (end > 0);
    return out;
}

// ---- sinkhorn ----------------------------------------------------------------------------------

// Whether the logits of this lane's matrix are so close to each other that with eps = 0 no entry of
// any iteration can underflow: all are at least exp(-2 * NARROW) / N.
enum { NARROW = 40 };
template <int N>
FUNCTION bool narrow(Floats<N> logits, Place here) {
    float high = largest_a(logits), low = -largest_a(times(-1.0f, logits));
    if (!inside<N>(here)) high = MINUS_INFINITY, low = -MINUS_INFINITY;
    for (int step = 1; step < Places<N>::COUNT; step *= 2) {
        high = precise::max(high, simd_partner(high, step));
        low = precise::min(low, simd_partner(low, step));
    }
    return high - low <= float(NARROW);  // false for infinities
}

// What iterations start from. Padding has none of it.
template <int N>
FUNCTION Floats<N> powers(Floats<N> logits, Place here) {
    if (!inside<N>(here)) return zeros<N>();
    return exps(logits, largest_a(logits));
}
template <int N>
FUNCTION Floats<N> logarithms(Floats<N> logits, Place here) {
    UNROLL for (int a = 0; a < N; a++)
        logits.at[a] = inside<N>(here) ? 0.5f * logits.at[a] : MINUS_INFINITY;
    return logits;
}

template <typename KIND, int N>
FUNCTION Floats<N> take_steps(Floats<N> v, int steps, float eps, Place here) {
    for (int k = 0; k < steps; k++) v = iterate<KIND>(v, eps, true, here).v;
    return values<KIND>(v);
}

// eps > 0 starts from S, a softmax along a: (S + eps) / (sum_b + eps).
template <int N>
FUNCTION Floats<N> softmax(Floats<N> logits, Place here) {
    const Floats<N> v = powers(logits, here);
    if (!inside<N>(here)) return v;
    return times(reciprocal(sum_a(v)), v);
}
template <int N>
FUNCTION Floats<N> started(Floats<N> softmax, float eps, Place here) {
    UNROLL for (int a = 0; a < N; a++) softmax.at[a] += inside<N>(here) ? eps : 0.0f;
    return Numbers::divide_b(softmax, eps, true, here).v;
}

// H_res of logits, at least one iteration. LOG: eps is 0, and a matrix whose entries might
// underflow is kept as logarithms; the others take the same iterations on the numbers, which is
// faster.
template <int N, bool LOG>
FUNCTION Floats<N> sinkhorn(Floats<N> logits, Place here, int iterations, float eps) {
    Floats<N> out = zeros<N>();
    if (LOG) {
        const bool by_numbers = narrow(logits, here);
        if (simd_any(by_numbers))
            out = take_steps<Numbers>(powers(logits, here), iterations, 0.0f, here);
        if (simd_any(!by_numbers)) {
            const Floats<N> start = logarithms(logits, here);
            const Floats<N> other = take_steps<Logarithms>(start, iterations, 0.0f, here);
            if (!by_numbers) out = other;
        }
    } else {
        const Floats<N> start = started(softmax(logits, here), eps, here);
        out = take_steps<Numbers>(start, iterations - 1, eps, here);
    }
    return out;
}

// The cotangent of the logits from g, that of H_res. The iterations are run again, their divisors
// are in `kept`: the DIVISORS floats of threadgroup memory that are this simdgroup's own.
template <int N, bool LOG, typename S>
FUNCTION Floats<N> sinkhorn_vjp(Floats<N> logits, Floats<N> g, Place here, int iterations,
                                float eps, S kept) {
    Floats<N> out = zeros<N>();
    if (!inside<N>(here)) g = zeros<N>();
    if (LOG) {
        const bool by_numbers = narrow(logits, here);
        if (simd_any(by_numbers)) {
            const Floats<N> start = powers(logits, here);
            out = pull_steps<Numbers, false>(start, g, iterations, iterations, 0.0f, kept, here).G;
        }
        if (simd_any(!by_numbers)) {
            const Floats<N> start = logarithms(logits, here);
            const Floats<N> other =
                pull_steps<Logarithms, false>(start, g, iterations, iterations, 0.0f, kept, here).G;
            if (!by_numbers) out = other;
        }
    } else {
        const Floats<N> soft = softmax(logits, here);
        const Floats<N> start = started(soft, eps, here);
        const int steps = iterations - 1;
        const Pulled<N> pulled =
            pull_steps<Numbers, false>(start, g, steps, steps, eps, kept, here);
        out = pull_b<Numbers>(pulled.G, pulled.v, sums_b(pulled.G, here));
        // the start, log(S + eps)
        UNROLL for (int a = 0; a < N; a++) out.at[a] *= soft.at[a] / (soft.at[a] + eps);
        out = pull_a<Numbers>(out, soft, sum_a(out));
    }
    return out;
}

// ---- sinkhorn_knopp ----------------------------------------------------------------------------
// Each matrix takes steps until its largest error is under epsilon: then it stays as it is.

// After `steps` of a lane's matrix, and `most` of any in the simdgroup.
template <int N>
struct Solved {
    Floats<N> v;
    int steps, most;
};

// How far the lines of this lane's matrix are from adding up to 1, at most.
template <int N>
FUNCTION float largest_error(Floats<N> v, Place here) {
    const float b = over_lines<Plus>(v, 0.0f, here);
    float error = inside<N>(here) ? precise::max(fabs(sum_a(v) - 1.0f), fabs(b - 1.0f)) : 0.0f;
    for (int step = 1; step < Places<N>::COUNT; step *= 2)
        error = precise::max(error, simd_partner(error, step));
    return error;
}

template <typename KIND, int N>
FUNCTION Solved<N> solve(Floats<N> start, bool active, int most, float epsilon, Place here) {
    Solved<N> out;
    out.v = start, out.steps = 0, out.most = 0;
    while (out.most < most && simd_any(active)) {
        out.v = iterate<KIND>(out.v, 0.0f, active, here).v;
        out.steps += active ? 1 : 0;
        out.most++;
        const float error = largest_error(values<KIND>(out.v), here);  // which needs all lanes
        active = active && !(error < epsilon);
    }
    return out;
}
template <typename KIND, int N>
FUNCTION Floats<N> solution(Floats<N> start, bool active, int most, float epsilon, Place here) {
    return values<KIND>(solve<KIND>(start, active, most, epsilon, here).v);
}
template <typename KIND, int N, typename S>
FUNCTION Floats<N> solution_vjp(Floats<N> start, Floats<N> g, bool active, int most, float epsilon,
                                S kept, Place here) {
    const Solved<N> solved = solve<KIND>(start, active, most, epsilon, here);
    return pull_steps<KIND, true>(start, g, solved.steps, solved.most, 0.0f, kept, here).G;
}

// Without LOG_SPACE it starts from exp(logits), no smaller than 1e-10: the same as from these logits.
FUNCTION float smallest_logit() { return -23.025850929940457f; }
template <int N>
FUNCTION Floats<N> floored(Floats<N> logits) {
    UNROLL for (int a = 0; a < N; a++)  // NaN stays, which max would drop
        logits.at[a] = logits.at[a] <= smallest_logit() ? smallest_logit() : logits.at[a];
    return logits;
}

template <int N, bool LOG_SPACE>
FUNCTION Floats<N> sinkhorn_knopp(Floats<N> logits, Place here, int most, float epsilon) {
    if (!LOG_SPACE) logits = floored(logits);
    Floats<N> out = zeros<N>();
    const bool by_numbers = narrow(logits, here);
    if (simd_any(by_numbers))
        out = solution<Numbers>(powers(logits, here), by_numbers, most, epsilon, here);
    if (simd_any(!by_numbers)) {
        const Floats<N> start = logarithms(logits, here);
        const Floats<N> other = solution<Logarithms>(start, !by_numbers, most, epsilon, here);
        if (!by_numbers) out = other;
    }
    return out;
}

// The cotangent of the logits, back through the steps that were taken; `kept` as in sinkhorn_vjp.
template <int N, bool LOG_SPACE, typename S>
FUNCTION Floats<N> sinkhorn_knopp_vjp(Floats<N> logits, Floats<N> g, Place here, int most,
                                      float epsilon, S kept) {
    Floats<N> from = logits;
    if (!LOG_SPACE) from = floored(logits);
    Floats<N> out = zeros<N>();
    if (!inside<N>(here)) g = zeros<N>();
    const bool by_numbers = narrow(from, here);
    if (simd_any(by_numbers)) {
        const Floats<N> start = powers(from, here);
        out = solution_vjp<Numbers>(start, g, by_numbers, most, epsilon, kept, here);
    }
    if (simd_any(!by_numbers)) {
        const Floats<N> start = logarithms(from, here);
        const Floats<N> other =
            solution_vjp<Logarithms>(start, g, !by_numbers, most, epsilon, kept, here);
        if (!by_numbers) out = other;
    }
    if (!LOG_SPACE) {
        UNROLL for (int a = 0; a < N; a++)
            out.at[a] = logits.at[a] <= smallest_logit() ? 0.0f : out.at[a];
    }
    return out;
}
