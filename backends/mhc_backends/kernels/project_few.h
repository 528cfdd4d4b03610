// project_few: what `project` gives, to the bit, where tokens are few.
//
// x[T, n, C], phi[m, n C] -> parts[T, P, m + 1]. A threadgroup takes a part and 16 tokens. Each of its
// simdgroups multiplies a leaf, and then their sums are added in the order of the tree.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = phi_shape[0];
const int64_t K = int64_t(N) * C;
threadgroup float numbers[LEAF_NUMBERS];

//// project_few<N, TILES, AT_ONCE>(x, phi, parts, numbers, T, C, M, K): aligned where C %
// BLOCK_CHANNELS == 0 && vectors<8>(x) && vectors<4>(phi) ////
typedef decltype(load_raw<8>(x)) Row;
const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
const int simdgroups = here.threads / SIMD;
const int P = (C + PART_CHANNELS - 1) / PART_CHANNELS, LEAF = AT_ONCE * BLOCK_CHANNELS;
const int NUMBERS = TILE_TOKENS * Width<TILES>::NUMBERS;  // of a leaf
const auto totals = &numbers[0], leaves = &numbers[NUMBERS];

for (int64_t item = here.group_x; item < (T + TILE_TOKENS - 1) / TILE_TOKENS * P;
     item += here.groups_x) {
    const int part = int(item % P), begin = part * PART_CHANNELS, rest = C - begin - channel;
    const int end = begin + PART_CHANNELS < C ? begin + PART_CHANNELS : C;
    const int count = (end - begin + LEAF - 1) / LEAF * N;
    const int64_t first = item / P * TILE_TOKENS;
    const int tokens = T - first < TILE_TOKENS ? int(T - first) : TILE_TOKENS;
    const auto starts = starts_of<1>(x + begin + channel, first, T, K, lane);

    for (int column = 0; column < M; column += TILES * TILE_COLUMNS) {
        for (int done = 0; done < count; done += simdgroups) {
            if (done + simdgroup < count) {
                const int own = done + simdgroup;
                const auto rows = load_leaf<N, AT_ONCE>(starts, C, own, rest);
                const auto right = load_factors<N, AT_ONCE, TILES, AT_ONCE>(
                    Row(), phi, K, M, C, column, begin, own * AT_ONCE, lane);
                const auto leaf = leaves + simdgroup * NUMBERS;
                TOGETHER;
                put_sums(leaf, add_leaf(no_sums<TILES, 1>(), rows, right), tokens, lane);
            }
            BARRIER;
            const int made = count - done < simdgroups ? count - done : simdgroups;
            add_leaves<TILES>(totals, leaves, made, tokens, done == 0, here);
            BARRIER;  // the leaves, and with the last ones the totals, are whole
        }
        store_totals<TILES>(totals, parts + (first * P + part) * (M + 1), int64_t(P) * (M + 1),
                            column, M, tokens, here);
    }
}
