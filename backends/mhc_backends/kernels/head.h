// head: the last stage, from the sums over n C in parts[T, P, n + 1] (project.h) to
// h = sum_i w_i x_i with w = sigmoid(u r scale + bias) + pre_eps.
//
// x[T, n, C], scale[1], bias[n] -> h[T, C], and for the vjp, where SAVES says so, w[T, n], u[T, n] and
// r[T, 1]. A threadgroup takes TOKENS tokens, or a stretch of their C, as in pre.h.

//// may be without w, u, r ////
const int64_t T = parts_shape[0];
const int C = x_shape[2];
threadgroup float sums[TOKENS * (N + 1)];

//// head<N, W, TOKENS, bool SAVES>(x, parts, parts_shape, scale, bias, h, u, w, r, settings, sums,
// T, C): aligned where vectors<W>(x) && vectors<W>(h) ////
for (int64_t first = int64_t(here.group_x) * TOKENS; first < T;
     first += int64_t(here.groups_x) * TOKENS) {
    sum_parts<TOKENS, N + 1>(parts, parts_shape[1], first, T, sums, here);
    BARRIER;
    for (int k = 0; k < TOKENS && first + k < T; k++) {
        const int64_t token = first + k;
        const float inverse = inverse_rms(sums[k * (N + 1) + N], float(N) * C, settings[0]);
        float weights[N];
        UNROLL for (int i = 0; i < N; i++)
            weights[i] = sigmoid(sums[k * (N + 1) + i] * inverse * float(scale[0]) + float(bias[i])) + settings[1];
        collapse<N, W>(x + token * N * C, weights, h + token * C, C, here);

        for (int i = here.id; i < N && SAVES && here.group_y == 0; i += here.threads) {
            const float product = sums[k * (N + 1) + i];
            u[token * N + i] = product;
            w[token * N + i] = sigmoid(product * inverse * float(scale[0]) + float(bias[i])) + settings[1];
            if (i == 0) r[token] = inverse;
        }
    }
    BARRIER;  // the next tokens use sums again
}
