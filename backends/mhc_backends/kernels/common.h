// What kernels share, in the words of either dialect.
//
// Template arguments that a body may name: N, the streams; W, the elements that a thread loads and
// stores at a time, which divides C.

// ---- W channels at a time ----------------------------------------------------------------------

template <int W>
FUNCTION Floats<W> zeros() {
    Floats<W> out;
    UNROLL for (int k = 0; k < W; k++) out.at[k] = 0.0f;
    return out;
}

// sum + factor * v
template <int W>
FUNCTION Floats<W> add(Floats<W> sum, float factor, Floats<W> v) {
    UNROLL for (int k = 0; k < W; k++) sum.at[k] = fma(factor, v.at[k], sum.at[k]);
    return sum;
}

// sum + a . b
template <int W>
FUNCTION float add_dot(float sum, Floats<W> a, Floats<W> b) {
    UNROLL for (int k = 0; k < W; k++) sum = fma(a.at[k], b.at[k], sum);
    return sum;
}

template <int W>
FUNCTION Floats<W> times(float factor, Floats<W> v) {
    UNROLL for (int k = 0; k < W; k++) v.at[k] *= factor;
    return v;
}

template <int W>
FUNCTION Floats<W> plus(Floats<W> a, Floats<W> b) {
    UNROLL for (int k = 0; k < W; k++) a.at[k] += b.at[k];
    return a;
}

template <int W>
FUNCTION Floats<W> product(Floats<W> a, Floats<W> b) {
    UNROLL for (int k = 0; k < W; k++) a.at[k] *= b.at[k];
    return a;
}

// The channels that a thread takes are from first_channel on, next_channel apart.
template <int W>
FUNCTION int first_channel(Place here) {
    return int(here.group_y * here.threads + here.id) * W;
}
template <int W>
FUNCTION int next_channel(Place here) {
    return int(here.groups_y * here.threads) * W;
}

// ---- mapped values -----------------------------------------------------------------------------

// Where a token's row begins in an array of so many rows: one per token, or one for all.
FUNCTION int64_t row(int rows, int64_t token) { return rows == 1 ? 0 : token; }

// COUNT numbers of a token: kept in registers where they are few, else read again from the cache.
// What is kept must be read in unrolled loops alone; registers have no index.
template <int COUNT, bool KEEP, typename P>
struct Held {
    P from;
    Floats<KEEP ? COUNT : 1> kept;
};
template <int COUNT, bool KEEP = (COUNT <= 16), typename P>
FUNCTION Held<COUNT, KEEP, P> hold(P from) {
    Held<COUNT, KEEP, P> held;
    held.from = from;
    if (KEEP) held.kept = load<KEEP ? COUNT : 1>(from);
    return held;
}
template <int COUNT, bool KEEP, typename P>
FUNCTION float value(Held<COUNT, KEEP, P> held, int k) {
    return KEEP ? held.kept.at[KEEP ? k : 0] : float(held.from[k]);
}

// Streams of 1e18 have squares of 1e36, of which float32 cannot hold the sum of 341. So all sums of
// squares are kept times 2^-16, which changes no other bit. sum + v . v, of few v that are not small:
FUNCTION float squares_unit() { return 1.0f / 65536.0f; }
template <int W>
FUNCTION float add_squares(float sum, Floats<W> v) {
    const Floats<W> scaled = times(1.0f / 256.0f, v);
    return add_dot(sum, scaled, scaled);
}
// 1 / sqrt(mean(x^2) + eps), over `count` numbers whose squares' sum is given
FUNCTION float inverse_rms(float squares, float count, float eps) {
    return 1.0f / precise::sqrt(squares / count / squares_unit() + eps);
}
// The pull of the root mean square on x, r^3 dr / K, is below float32's numbers for streams of 1e18.
// So it is kept times 2^24, and meets x times 2^-24.
FUNCTION float pull_unit() { return 1.0f / 16777216.0f; }
// dr r^3 / K, in an order in which nothing leaves float32: r^3 may be no float.
FUNCTION float pull_of(float dr, float r, float K) {
    return dr * r * r * (r * (1.0f / pull_unit() / K));
}

// ---- sums over a threadgroup -------------------------------------------------------------------

// Sums COUNT numbers of each thread, in an order that depends on nothing but the number of threads.
// All threads must come here. Sum k is then in shared[k] for thread k (k + threads, ...), which put
// it there; a BARRIER shows it to the others, and another one must come before `shared` is used
// again. `shared` needs COUNT * MOST_SIMDGROUPS floats.
template <int COUNT, typename V, typename S>
FUNCTION void group_sums(V values, S shared, Place here) {
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD;
    UNROLL for (int k = 0; k < COUNT; k++) {
        const float sum = simd_sum(values[k]);
        if (lane == 0) shared[simdgroup * COUNT + k] = sum;
    }
    BARRIER;
    for (int k = here.id; k < COUNT; k += here.threads) {
        for (int s = 1; s < int(here.threads) / SIMD; s++) shared[k] += shared[s * COUNT + k];
    }
}
