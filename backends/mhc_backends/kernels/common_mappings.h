// From the parts that `project` gives to the mappings: what the kernels that end them share.

enum { PARTS_AT_ONCE = 8 };  // that a thread has under way

// 1 / (1 + exp(-z)), exact far below zero and without overflow
FUNCTION float sigmoid(float z) {
    const float small = precise::exp(z < 0.0f ? z : -z);
    return (z < 0.0f ? small : 1.0f) / (1.0f + small);
}

// sums[k * NUMBERS + number]: the parts[T, count, NUMBERS] of TOKENS tokens from `first` on, added up
// one by one. All threads must come here, and a BARRIER must follow.
template <int TOKENS, int NUMBERS, typename P, typename S>
FUNCTION void sum_parts(P parts, int count, int64_t first, int64_t T, S sums, Place here) {
    const int tokens = T - first < TOKENS ? int(T - first) : TOKENS;
    for (int item = here.id; item < tokens * NUMBERS; item += here.threads) {
        const auto from = parts + (first + item / NUMBERS) * count * NUMBERS + item % NUMBERS;
        float sum = 0.0f;
        int part = 0;
        for (; part + PARTS_AT_ONCE <= count; part += PARTS_AT_ONCE) {
            Floats<PARTS_AT_ONCE> some;
            UNROLL for (int k = 0; k < PARTS_AT_ONCE; k++) some.at[k] = from[(part + k) * NUMBERS];
            UNROLL for (int k = 0; k < PARTS_AT_ONCE; k++) sum += some.at[k];
        }
        for (; part < count; part++) sum += from[part * NUMBERS];
        sums[item] = sum;
    }
}

// From the sums of TOKENS tokens, M = n n + 2 n products and the squares of each, to u (the
// products), r (1 / rms), h_pre and h_post, which are stored where `stores` says so. What follows
// reads h_pre and the logits of H_res where the products were, in `sums`: a BARRIER must come first.
// `settings` are the variant's norm_eps, pre_eps, post_scale and sinkhorn's eps.
template <int N, int TOKENS, bool SAVES, typename S, typename A, typename B, typename C, typename P,
          typename Q>
FUNCTION void activate(S sums, A scale, B bias, C settings, float count, int64_t first, int64_t T,
                       bool stores, Q u, Q r, P h_pre, P h_post, Place here) {
    const int M = N * N + 2 * N;
    const int tokens = T - first < TOKENS ? int(T - first) : TOKENS;
    for (int item = here.id; item < tokens * M; item += here.threads) {
        const int k = item / M, column = item % M;
        const int64_t token = first + k;
        const int group = column < N ? 0 : column < 2 * N ? 1 : 2;
        const float product = sums[k * (M + 1) + column];
        const float inverse = inverse_rms(sums[k * (M + 1) + M], count, settings[0]);
        const float z = product * inverse * float(scale[group]) + float(bias[column]);
        const float mapped = group == 0   ? sigmoid(z) + settings[1]
                             : group == 1 ? settings[2] * sigmoid(z)
                                          : z;
        if (stores) {
            if (SAVES) u[token * M + column] = product;
            if (SAVES && column == 0) r[token] = inverse;
            if (group == 0) h_pre[token * N + column] = mapped;
            if (group == 1) h_post[token * N + column - N] = mapped;
        }
        sums[k * (M + 1) + column] = mapped;
    }
}

// H_res of TOKENS tokens from their logits in `sums`; each simdgroup takes as many as fit in it.
template <int N, int TOKENS, int ITERATIONS, bool LOG, bool FIRST_COLUMNS, bool TRANSPOSED,
          typename S, typename P>
FUNCTION void mix_matrices(S sums, float eps, int64_t first, int64_t T, P h_res, Place here) {
    enum { NUMBERS = N * N + 2 * N + 1, AT_ONCE = SIMD / Places<N>::COUNT };
    const int lane = here.id % SIMD, b = line<N>(here);
    const int tokens = T - first < TOKENS ? int(T - first) : TOKENS;
    const int step = here.threads / SIMD * AT_ONCE;
    for (int begin = here.id / SIMD * AT_ONCE; begin < tokens; begin += step) {
        const int k = begin + lane / Places<N>::COUNT;
        const bool there = k < tokens && inside<N>(here);
        Floats<N> logits = zeros<N>();
        UNROLL for (int a = 0; a < N; a++) {
            const int at = 2 * N + entry<N, FIRST_COLUMNS, TRANSPOSED>(a, b);
            if (there) logits.at[a] = sums[k * NUMBERS + at];
        }
        const Floats<N> mixed = sinkhorn<N, LOG>(logits, here, ITERATIONS, eps);
        store_line<N, FIRST_COLUMNS, false>(h_res + (first + k) * N * N, mixed, there, here);
    }
}

// h = sum_i w_i x_i of one token's channels, the weights being in registers or in `sums`.
template <int N, int W, typename X, typename V, typename H>
FUNCTION void collapse(X streams, V weights, H h, int C, Place here) {
    for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
        Floats<W> sum = zeros<W>();
        UNROLL for (int i = 0; i < N; i++)
            sum = add(sum, weights[i], load<W>(streams + int64_t(i) * C + c));
        store(h + c, sum);
    }
}
