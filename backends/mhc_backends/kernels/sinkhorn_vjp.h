// The vjp of sinkhorn: the iterations are run again and walked back, as common_sinkhorn.h says.
//
// logits, g[T, n, n], eps[1] -> out[T, n, n], the cotangent of the logits. Constants as in
// sinkhorn. A simdgroup takes as many matrices as its lanes hold; their divisors are in threadgroup
// memory.

const int64_t T = logits_shape[0];
threadgroup float kept[DIVISORS * KEEPERS];
const auto own = own_divisors(&kept[0], here);

for (int64_t tokens = first_tokens<N, KEEPERS>(T, here); tokens < T;
     tokens += next_tokens<N, KEEPERS>(here)) {
    const int64_t token = tokens + own_token<N>(here);
    const bool there = token < T;
    const Floats<N> v = load_line<N, FIRST_COLUMNS, false>(logits + token * N * N, there, here);
    const Floats<N> dres = load_line<N, FIRST_COLUMNS, false>(g + token * N * N, there, here);
    const Floats<N> dv = sinkhorn_vjp<N, LOG>(v, dres, here, ITERATIONS, float(eps[0]), own);
    store_line<N, FIRST_COLUMNS, false>(out + token * N * N, dv, there, here);
}
