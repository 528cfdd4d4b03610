// The stages of static_layer that follow its sums over C, for all streams at W channels. The
// mappings are arrays of floats: pre[n], post[n], res[n, n].

// out_i = sum_j H_res[i, j] x_j + h_post_i y, with y = h r weight; stream i is C after stream i - 1
template <int N, int W, typename P, typename H>
FUNCTION void mix_static(
    P out, int C, Streams<N, W> x, float r, Floats<W> weight, H pre, H post, H res) {
    const Floats<W> y = product(times(r, collapse(pre, x)), weight);
    UNROLL_SMALL for (int i = 0; i < N; i++) {
        Floats<W> sum = times(post[i], y);
        UNROLL for (int j = 0; j < N; j++) sum = add(sum, res[i * N + j], x.at[j]);
        store(out + int64_t(i) * C, sum);
    }
}

// dx_j = sum_i H_res[i, j] g_i + h_pre_j dh; to the sums, of dh_pre, dh_post and dH_res in turn,
// are added x_j . dh, g_i . y and g_i . x_j. Gives dweight = dy h r.
template <int N, int W, typename P, typename V, typename H>
FUNCTION Floats<W> static_back(
    P dx, int C, Streams<N, W> x, Streams<N, W> g, float r, float pulled, Floats<W> weight,
    V sums, H pre, H post, H res) {
    const Floats<W> h = collapse(pre, x), dy = collapse(post, g);
    const Floats<W> scaled = times(r, h), y = product(scaled, weight);
    const Floats<W> dh = rms_norm_back(h, weight, dy, r, pulled);

    UNROLL for (int j = 0; j < N; j++) {
        Floats<W> dx_j = times(pre[j], dh);
        UNROLL for (int i = 0; i < N; i++) dx_j = add(dx_j, res[i * N + j], g.at[i]);
        store(dx + int64_t(j) * C, dx_j);
    }
    UNROLL for (int i = 0; i < N; i++) {
        sums[i] = add_dot(sums[i], x.at[i], dh);
        sums[N + i] = add_dot(sums[N + i], g.at[i], y);
        UNROLL for (int j = 0; j < N; j++)
            sums[2 * N + i * N + j] = add_dot(sums[2 * N + i * N + j], g.at[i], x.at[j]);
    }
    return product(dy, scaled);
}
