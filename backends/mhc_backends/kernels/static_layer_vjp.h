// The vjp of static_layer for few streams, in one pass over them. With dy = sum_i h_post_i g_i and
// dh that of the RMS norm: dx_j = sum_i H_res[i, j] g_i + h_pre_j dh; dh_pre_j = x_j . dh;
// dh_post_i = g_i . y; dH_res[i, j] = g_i . x_j; dweight = sum_T dy h r.
//
// x, g[T, n, C], h_pre[n], h_post[n], h_res[n, n], weight[C], eps[1] -> dx[T, n, C] and, a row for
// the share of the tokens that a threadgroup takes, sums[shares, 2 n + n * n + C]: of dh_pre,
// dh_post, dH_res and dweight. Registers are used as in static_layer.

const int64_t T = x_shape[0];
const int C = x_shape[2];
const int SUMS = 2 * N + N * N;  // those that end over C
threadgroup float pre[N];
threadgroup float post[N];
threadgroup float res[N * N];
threadgroup float shared[SUMS * MOST_SIMDGROUPS];
threadgroup float norms[2 * 2 * MOST_SIMDGROUPS];
for (int k = here.id; k < N; k += here.threads) {
    pre[k] = float(h_pre[k]);
    post[k] = float(h_post[k]);
}
for (int k = here.id; k < N * N; k += here.threads) res[k] = float(h_res[k]);
BARRIER;

//// static_layer_vjp<N, W, HELD, REST, SUMS>(x, weight, eps, g, dx, sums, pre, post, res, shared,
// norms, T, C): aligned where vectors<W>(x) && vectors<W>(weight) && vectors<W>(g) &&
// vectors<W>(dx) && SUMS % W == 0 && vectors<W>(sums + SUMS) ////
const int first = first_channel<W>(here), step = next_channel<W>(here);
const int rest = REST ? first + HELD * step : C;
const auto row_of_sums = sums + int64_t(here.group_x) * (SUMS + C);
const auto row_of_dweight = row_of_sums + SUMS;
int turn = 0;  // tokens take turns with the halves of `norms`

float own[SUMS];  // of this thread's channels, over the tokens
UNROLL for (int k = 0; k < SUMS; k++) own[k] = 0.0f;
Floats<W> dweights[HELD];
UNROLL for (int k = 0; k < HELD; k++) dweights[k] = zeros<W>();

for (int64_t token = here.group_x; token < T; token += here.groups_x) {
    const int64_t at = token * N * C;

    // h . h and (h weight) . dy
    decltype(load_raw_streams<N, W>(x + at, C, 0)) xs[HELD];
    decltype(load_raw_streams<N, W>(g + at, C, 0)) gs[HELD];
    Floats<2> norm = zeros<2>();
    UNROLL for (int k = 0; k < HELD; k++) {
        const int c = first + k * step;
        xs[k] = load_raw_streams<N, W>(x + at, C, c);
        gs[k] = load_raw_streams<N, W>(g + at, C, c);
    }
    UNROLL for (int k = 0; k < HELD; k++) {
        const int c = first + k * step;
        const Floats<W> h = collapse(pre, floats(xs[k])), dy = collapse(post, floats(gs[k]));
        norm.at[0] = add_squares(norm.at[0], h);
        if (c < C) norm.at[1] = add_dot(norm.at[1], product(h, load<W>(weight + c)), dy);
    }
    for (int c = rest; c < C; c += step) {
        const Floats<W> h = collapse(pre, load_streams<N, W>(x + at, C, c));
        const Floats<W> dy = collapse(post, load_streams<N, W>(g + at, C, c));
        norm.at[0] = add_squares(norm.at[0], h);
        norm.at[1] = add_dot(norm.at[1], product(h, load<W>(weight + c)), dy);
    }
    norm = sums_for_all(norm, norms + turn * 2 * MOST_SIMDGROUPS, here);
    turn = 1 - turn;
    const float r = inverse_rms(norm.at[0], float(C), float(eps[0]));
    const float pulled = r * norm.at[1] / float(C);

    UNROLL for (int k = 0; k < HELD; k++) {
        const int c = first + k * step;
        if (c < C) {
            const Streams<N, W> x_c = floats(xs[k]), g_c = floats(gs[k]);
            const Floats<W> dweight = static_back<N, W>(
                dx + at + c, C, x_c, g_c, r, pulled, load<W>(weight + c), own, pre, post, res);
            dweights[k] = add(dweights[k], 1.0f, dweight);
        }
    }
    for (int c = rest; c < C; c += step) {
        const Streams<N, W> x_c = load_streams<N, W>(x + at, C, c);
        const Streams<N, W> g_c = load_streams<N, W>(g + at, C, c);
        Floats<W> dweight = static_back<N, W>(
            dx + at + c, C, x_c, g_c, r, pulled, load<W>(weight + c), own, pre, post, res);
        // no register has an index: what earlier tokens gave is where this thread left it
        if (token != here.group_x) dweight = add(dweight, 1.0f, load<W>(row_of_dweight + c));
        store(row_of_dweight + c, dweight);
    }
}

UNROLL for (int k = 0; k < HELD; k++) {
    if (first + k * step < C) store(row_of_dweight + first + k * step, dweights[k]);
}
group_sums<SUMS>(own, shared, here);
for (int k = here.id; k < SUMS; k += here.threads) row_of_sums[k] = shared[k];
