// aggregate: h = sum_i h_pre_i x_i.
//
// x[T, n, C], h_pre[T or 1, n] -> h[T, C]. A threadgroup takes one token, or a stretch of its C.

const int64_t T = x_shape[0];
const int C = x_shape[2];

//// aggregate<N, W>(x, h_pre, h_pre_shape, h, T, C): aligned where vectors<W>(x) && vectors<W>(h)
// && vectors<N>(h_pre) ////
for (int64_t token = here.group_x; token < T; token += here.groups_x) {
    const auto streams = x + token * N * C;
    const auto weights = hold<N>(h_pre + row(h_pre_shape[0], token) * N);

    for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
        Floats<W> sum = zeros<W>();
        UNROLL for (int i = 0; i < N; i++)
            sum = add(sum, value(weights, i), load<W>(streams + i * C + c));
        store(h + token * C + c, sum);
    }
}
