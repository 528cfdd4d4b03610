// All streams of a token at W channels, and what kernels do that keep them in registers.

template <int N, int W>
struct Streams {
    Floats<W> at[N];
};

// The same as they are in memory.
template <int N, typename R>
struct RawStreams {
    R at[N];
};

// The streams at channels c, c + 1, ..., each C long; zeros beyond C.
template <int N, int W, typename P>
FUNCTION auto load_raw_streams(P token, int C, int c) {
    RawStreams<N, decltype(load_raw<W>(token))> out = {};
    if (c < C) {
        UNROLL for (int i = 0; i < N; i++) out.at[i] = load_raw<W>(token + int64_t(i) * C + c);
    }
    return out;
}
template <int N, typename T, int W>
FUNCTION Streams<N, W> floats(RawStreams<N, Raw<T, W>> raw) {
    Streams<N, W> out;
    UNROLL for (int i = 0; i < N; i++) out.at[i] = floats(raw.at[i]);
    return out;
}
template <int N, int W, typename P>
FUNCTION Streams<N, W> load_streams(P token, int C, int c) {
    return floats(load_raw_streams<N, W>(token, C, c));
}

// sum_i weights_i x_i
template <int N, int W, typename H>
FUNCTION Floats<W> collapse(H weights, Streams<N, W> x) {
    Floats<W> sum = zeros<W>();
    UNROLL for (int i = 0; i < N; i++) sum = add(sum, weights[i], x.at[i]);
    return sum;
}

// The number of a stream, of the last one for those beyond.
template <int N>
FUNCTION int within(int i) {
    return i < N ? i : N - 1;
}

// ---- the RMS norm ------------------------------------------------------------------------------

// dh = r (weight dy - h r pulled), with pulled = mean(h r weight dy)
template <int W>
FUNCTION Floats<W> rms_norm_back(
    Floats<W> h, Floats<W> weight, Floats<W> dy, float r, float pulled) {
    Floats<W> dh = product(weight, dy);
    UNROLL for (int k = 0; k < W; k++) dh.at[k] = r * (dh.at[k] - h.at[k] * r * pulled);
    return dh;
}

// ---- sums over a threadgroup that all its threads use ------------------------------------------

// Sums COUNT numbers of each thread for every thread, in an order that depends on nothing but the
// number of threads. All threads must come here. There is one barrier: the next call needs another
// `shared`, and the one after it may have this one again. It needs COUNT * MOST_SIMDGROUPS floats.
template <int COUNT, typename S>
FUNCTION Floats<COUNT> sums_for_all(Floats<COUNT> values, S shared, Place here) {
    const int lane = here.id % SIMD, simdgroup = here.id / SIMD;
    UNROLL for (int k = 0; k < COUNT; k++) {
        const float sum = simd_sum(values.at[k]);
        if (lane == 0) shared[simdgroup * COUNT + k] = sum;
    }
    BARRIER;
    Floats<COUNT> sums = zeros<COUNT>();
    for (int s = 0; s < int(here.threads) / SIMD; s++) {
        UNROLL for (int k = 0; k < COUNT; k++) sums.at[k] += shared[s * COUNT + k];
    }
    return sums;
}
