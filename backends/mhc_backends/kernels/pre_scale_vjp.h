// The vjp of pre_scale: dx_i = h_pre_i g_i; dh_pre_i = x_i . g_i.
//
// x, g[T, n, C], h_pre[T or 1, n] -> dx[T, n, C], dh_pre[T, n], per token also where h_pre is one
// for all. A threadgroup takes whole tokens.

const int64_t T = x_shape[0];
const int C = x_shape[2];
threadgroup float shared[N * MOST_SIMDGROUPS];

//// pre_scale_vjp<N, W>(x, h_pre, h_pre_shape, g, dx, dh_pre, shared, T, C): aligned where
// vectors<W>(x) && vectors<W>(g) && vectors<W>(dx) && vectors<N>(h_pre) ////
for (int64_t token = here.group_x; token < T; token += here.groups_x) {
    const int64_t at = token * N * C;
    const auto weights = hold<N>(h_pre + row(h_pre_shape[0], token) * N);

    float dweights[N];  // of this thread's channels
    UNROLL for (int i = 0; i < N; i++) dweights[i] = 0.0f;
    for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
        const auto raw_x = load_raw_streams<N, W>(x + at, C, c);
        const auto raw_g = load_raw_streams<N, W>(g + at, C, c);
        UNROLL for (int i = 0; i < N; i++) {
            const Floats<W> g_i = floats(raw_g.at[i]);
            dweights[i] = add_dot(dweights[i], floats(raw_x.at[i]), g_i);
            store(dx + at + int64_t(i) * C + c, times(value(weights, i), g_i));
        }
    }

    group_sums<N>(dweights, shared, here);
    for (int i = here.id; i < N; i += here.threads) dh_pre[token * N + i] = shared[i];
    BARRIER;  // the next token uses shared again
}
