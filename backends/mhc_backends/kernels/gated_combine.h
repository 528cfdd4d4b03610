// gated_combine: out_i = h_post_i (y_i + sum_j H_res[i, j] h_pre_j x_j).
//
// x, y[T, n, C], h_pre, h_post[T or 1, n], h_res[T or 1, n, n] -> out[T, n, C]. A threadgroup takes
// one token, or a stretch of its C.

const int64_t T = x_shape[0];
const int C = x_shape[2];
const int YS = N <= 4 ? N : 1;  // streams of y that are loaded together with those of x

//// gated_combine<N, W, YS>(x, y, h_pre, h_pre_shape, h_post, h_post_shape, h_res, h_res_shape,
// out, T, C): aligned where vectors<W>(x) && vectors<W>(y) && vectors<W>(out) && vectors<N>(h_pre)
// && vectors<N>(h_post) && vectors<N * N>(h_res) ////
for (int64_t token = here.group_x; token < T; token += here.groups_x) {
    const int64_t at = token * N * C;
    const auto pre = hold<N, N <= 4>(h_pre + row(h_pre_shape[0], token) * N);
    const auto post = hold<N, N <= 4>(h_post + row(h_post_shape[0], token) * N);
    const auto res = hold<N * N, N <= 4>(h_res + row(h_res_shape[0], token) * N * N);

    for (int c = first_channel<W>(here); c < C; c += next_channel<W>(here)) {
        const auto raw_x = load_raw_streams<N, W>(x + at, C, c);
        const auto raw_y = load_raw_streams<YS, W>(y + at, C, c);
        Floats<W> gated[N];  // h_pre_j x_j
        UNROLL for (int j = 0; j < N; j++) gated[j] = times(value(pre, j), floats(raw_x.at[j]));

        UNROLL_SMALL for (int i = 0; i < N; i++) {
            Floats<W> sum =
                YS == N ? floats(raw_y.at[YS == N ? i : 0]) : load<W>(y + at + int64_t(i) * C + c);
            UNROLL for (int j = 0; j < N; j++) sum = add(sum, value(res, i * N + j), gated[j]);
            store(out + at + int64_t(i) * C + c, times(value(post, i), sum));
        }
    }
}
