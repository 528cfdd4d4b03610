// The vjp of sinkhorn_knopp, back through the steps that each matrix took.
//
// logits, g[T, n, n], epsilon[1] -> out[T, n, n], the cotangent of the logits. Constants and lanes
// as in sinkhorn_knopp; the divisors are in threadgroup memory.

const int64_t T = logits_shape[0];
threadgroup float kept[DIVISORS * KEEPERS];
const auto own = own_divisors(&kept[0], here);

for (int64_t tokens = first_tokens<N, KEEPERS>(T, here); tokens < T;
     tokens += next_tokens<N, KEEPERS>(here)) {
    const int64_t token = tokens + own_token<N>(here);
    const bool there = token < T;
    const Floats<N> v = load_line<N, false, false>(logits + token * N * N, there, here);
    const Floats<N> dres = load_line<N, false, false>(g + token * N * N, there, here);
    const Floats<N> dv =
        sinkhorn_knopp_vjp<N, LOG_SPACE>(v, dres, here, ITERATIONS, float(epsilon[0]), own);
    store_line<N, false, false>(out + token * N * N, dv, there, here);
}
