// The vjp of aggregate: dx_i = h_pre_i g; dh_pre_i = sum_C x_i g.
//
// x[T, n, C], h_pre[T or 1, n], g[T, C] -> dx[T, n, C], dh_pre[T, n], per token also where h_pre is
// one for all. A threadgroup takes whole tokens.

const int64_t T = x_shape[0];
const int C = x_shape[2];
threadgroup float shared[N * MOST_SIMDGROUPS];

//// aggregate_vjp<N, W>(x, h_pre, h_pre_shape, g, dx, dh_pre, shared, T, C): aligned where
// vectors<W>(x) && vectors<W>(g) && vectors<W>(dx) && vectors<N>(h_pre) ////
for (int64_t token = here.group_x; token < T; token += here.groups_x) {
    const auto streams = x + token * N * C;
    const auto dstreams = dx + token * N * C;
    const auto weights = hold<N>(h_pre + row(h_pre_shape[0], token) * N);

    float dweights[N];  // of this thread's channels
    UNROLL for (int i = 0; i < N; i++) dweights[i] = 0.0f;
    for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
        const Floats<W> dh = load<W>(g + token * C + c);
        UNROLL for (int i = 0; i < N; i++) {
            dweights[i] = add_dot(dweights[i], load<W>(streams + i * C + c), dh);
            store(dstreams + i * C + c, times(value(weights, i), dh));
        }
    }

    group_sums<N>(dweights, shared, here);
    for (int i = here.id; i < N; i += here.threads) dh_pre[token * N + i] = shared[i];
    BARRIER;  // the next token uses shared again
}
