// mappings: the last stage, from the sums over n C in parts[T, P, m + 1] (project.h) to the mappings
// (eqs. 16-19): z = u r scale + bias; H_pre = sigmoid(z) + pre_eps; H_post = post_scale sigmoid(z);
// H_res = sinkhorn(z).
//
// scale[3], bias[m] -> h_pre[T, n], h_post[T, n], h_res[T, n, n], and for the vjp, where SAVES says so,
// u[T, m] and r[T, 1]. A threadgroup takes TOKENS tokens. CHANNELS is C.

//// may be without u, r ////
const int64_t T = parts_shape[0];
const int M = N * N + 2 * N;
threadgroup float sums[TOKENS * (M + 1)];

for (int64_t first = int64_t(here.group_x) * TOKENS; first < T;
     first += int64_t(here.groups_x) * TOKENS) {
    sum_parts<TOKENS, M + 1>(parts, parts_shape[1], first, T, sums, here);
    BARRIER;
    activate<N, TOKENS, SAVES>(sums, scale, bias, settings, float(N) * CHANNELS, first, T, true, u,
                               r, h_pre, h_post, here);
    BARRIER;
    mix_matrices<N, TOKENS, ITERATIONS, LOG, FIRST_COLUMNS, TRANSPOSED>(sums, settings[3], first, T,
                                                                        h_res, here);
    BARRIER;  // the next tokens use sums again
}
