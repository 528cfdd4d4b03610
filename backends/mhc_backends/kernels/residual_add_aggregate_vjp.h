// The vjp of residual_add_aggregate: dx_i = g_i + h_pre_i g_h, and dres is the same;
// dh_pre_i = (x + res)_i . g_h.
//
// x, res, g[T, n, C], g_h[T, C], h_pre[T or 1, n] -> dx[T, n, C], dh_pre[T, n], per token also
// where h_pre is one for all. A threadgroup takes whole tokens.

const int64_t T = x_shape[0];
const int C = x_shape[2];
threadgroup float shared[N * MOST_SIMDGROUPS];

//// residual_add_aggregate_vjp<N, W>(x, res, h_pre, h_pre_shape, g, g_h, dx, dh_pre, shared, T, C):
// aligned where vectors<W>(x) && vectors<W>(res) && vectors<W>(g) && vectors<W>(g_h) &&
// vectors<W>(dx) && vectors<N>(h_pre) ////
for (int64_t token = here.group_x; token < T; token += here.groups_x) {
    const int64_t at = token * N * C;
    const auto weights = hold<N>(h_pre + row(h_pre_shape[0], token) * N);

    float dweights[N];  // of this thread's channels
    UNROLL for (int i = 0; i < N; i++) dweights[i] = 0.0f;
    for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
        const auto raw_x = load_raw_streams<N, W>(x + at, C, c);
        const auto raw_res = load_raw_streams<N, W>(res + at, C, c);
        const auto raw_g = load_raw_streams<N, W>(g + at, C, c);
        const Floats<W> dh = load<W>(g_h + token * C + c);
        UNROLL for (int i = 0; i < N; i++) {
            const Floats<W> total = add(floats(raw_x.at[i]), 1.0f, floats(raw_res.at[i]));
            dweights[i] = add_dot(dweights[i], total, dh);
            store(dx + at + int64_t(i) * C + c, add(floats(raw_g.at[i]), value(weights, i), dh));
        }
    }

    group_sums<N>(dweights, shared, here);
    for (int i = here.id; i < N; i += here.threads) dh_pre[token * N + i] = shared[i];
    BARRIER;  // the next token uses shared again
}
