// weights_vjp: what h = sum_i w_i x_i gives its weights, dw_i = sum_C x_i dh.
//
// x[T, n, C], dh[T, C] -> dw[T, n]. A threadgroup takes whole tokens.

const int64_t T = x_shape[0];
const int C = x_shape[2];
threadgroup float shared[N * MOST_SIMDGROUPS];

//// weights_vjp<N, W>(x, dh, dw, shared, T, C): aligned where vectors<W>(x) && vectors<W>(dh) ////
for (int64_t token = here.group_x; token < T; token += here.groups_x) {
    float sums[N];  // of this thread's channels
    UNROLL for (int i = 0; i < N; i++) sums[i] = 0.0f;
    for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
        const Floats<W> layer = load<W>(dh + token * C + c);
        UNROLL for (int i = 0; i < N; i++)
            sums[i] = add_dot(sums[i], load<W>(x + (token * N + i) * C + c), layer);
    }
    group_sums<N>(sums, shared, here);
    for (int i = here.id; i < N; i += here.threads) dw[token * N + i] = shared[i];
    BARRIER;  // the next token uses shared again
}
