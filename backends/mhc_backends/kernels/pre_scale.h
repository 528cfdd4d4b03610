// pre_scale: out_i = h_pre_i x_i.
//
// x[T, n, C], h_pre[T or 1, n] -> out[T, n, C]. A threadgroup takes one token, or a stretch of its
// C.

const int64_t T = x_shape[0];
const int C = x_shape[2];

//// pre_scale<N, W>(x, h_pre, h_pre_shape, out, T, C): aligned where vectors<W>(x) &&
// vectors<W>(out) && vectors<N>(h_pre) ////
for (int64_t token = here.group_x; token < T; token += here.groups_x) {
    const int64_t at = token * N * C;
    const auto weights = hold<N>(h_pre + row(h_pre_shape[0], token) * N);

    for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
        const Streams<N, W> xs = load_streams<N, W>(x + at, C, c);
        UNROLL for (int i = 0; i < N; i++)
            store(out + at + int64_t(i) * C + c, times(value(weights, i), xs.at[i]));
    }
}
