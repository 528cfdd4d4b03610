// static_layer: out_i = sum_j H_res[i, j] x_j + h_post_i y, with y = h r weight, the RMS norm of
// h = sum_i h_pre_i x_i: r = 1 / sqrt(mean(h^2) + eps).
//
// x[T, n, C], h_pre[n], h_post[n], h_res[n, n], weight[C], eps[1] -> out[T, n, C]. A threadgroup
// takes whole tokens. Between the two uses of the streams a thread keeps its first HELD accesses in
// registers; where there is a REST, it reads that again.

const int64_t T = x_shape[0];
const int C = x_shape[2];
threadgroup float pre[N];
threadgroup float post[N];
threadgroup float res[N * N];
threadgroup float shared[2 * MOST_SIMDGROUPS];
for (int k = here.id; k < N; k += here.threads) {
    pre[k] = float(h_pre[k]);
    post[k] = float(h_post[k]);
}
for (int k = here.id; k < N * N; k += here.threads) res[k] = float(h_res[k]);
BARRIER;

//// static_layer<N, W, HELD, REST>(x, weight, eps, out, pre, post, res, shared, T, C): aligned
// where vectors<W>(x) && vectors<W>(weight) && vectors<W>(out) ////
const int first = first_channel<W>(here), step = next_channel<W>(here);
const int rest = REST ? first + HELD * step : C;
int turn = 0;  // tokens take turns with the halves of `shared`

for (int64_t token = here.group_x; token < T; token += here.groups_x) {
    const auto streams = x + token * N * C;
    const auto outs = out + token * N * C;

    // h . h
    decltype(load_raw_streams<N, W>(streams, C, 0)) kept[HELD];
    Floats<1> squares = zeros<1>();
    UNROLL for (int k = 0; k < HELD; k++)
        kept[k] = load_raw_streams<N, W>(streams, C, first + k * step);
    UNROLL for (int k = 0; k < HELD; k++) {
        const Floats<W> h = collapse(pre, floats(kept[k]));
        squares.at[0] = add_squares(squares.at[0], h);
    }
    for (int c = rest; c < C; c += step) {
        const Floats<W> h = collapse(pre, load_streams<N, W>(streams, C, c));
        squares.at[0] = add_squares(squares.at[0], h);
    }
    squares = sums_for_all(squares, shared + turn * MOST_SIMDGROUPS, here);
    turn = 1 - turn;
    const float r = inverse_rms(squares.at[0], float(C), float(eps[0]));

    UNROLL for (int k = 0; k < HELD; k++) {
        const int c = first + k * step;
        if (c < C) {
            const Streams<N, W> xs = floats(kept[k]);
            mix_static<N, W>(outs + c, C, xs, r, load<W>(weight + c), pre, post, res);
        }
    }
    for (int c = rest; c < C; c += step) {
        const Streams<N, W> xs = load_streams<N, W>(streams, C, c);
        mix_static<N, W>(outs + c, C, xs, r, load<W>(weight + c), pre, post, res);
    }
}
