// project: what the mappings need of the streams, x . phi and x . x over all n C (eqs. 14-15), in
// parts that common_mappings.h adds up.
//
// x[T, n, C], phi[m, n C] -> parts[T, P, m + 1], the last column for the squares. A threadgroup takes
// a part, and of its tokens HEIGHT tiles of 16 for each simdgroup at a time. They share phi, in
// threadgroup memory: that of STAGE blocks, or of the whole part, once for all of the threadgroup's
// tokens. A leaf is AT_ONCE blocks; while one is multiplied, the next AHEAD are on their way.

const int64_t T = x_shape[0];
const int C = x_shape[2], M = phi_shape[0];
const int64_t K = int64_t(N) * C;
threadgroup LAUNCHED uint4 factors[LAUNCH_SIZE(STAGE * RIGHT_QUADS(TILES) * SIMD + SLOTS)];

//// project<N, TILES, HEIGHT, AT_ONCE, STAGE, AHEAD>(x, phi, parts, factors, T, C, M, K): aligned
// where C % BLOCK_CHANNELS == 0 && vectors<8>(x) && vectors<4>(phi) ////
typedef decltype(load_raw<8>(x)) Row;
const bool ALIGNED = Address<decltype(x)>::ALIGNED;
const int FACTOR = decltype(factor_for(Row(), RightTiles<TILES>()))::QUADS * SIMD;
const int SLOT = Slot<AT_ONCE, HEIGHT, Row>::QUADS, LEAF = AT_ONCE * BLOCK_CHANNELS;
const int lane = here.id % SIMD, simdgroup = here.id / SIMD, channel = 4 * tile_pair(lane);
const Work work = work_of(C, here.threads / SIMD * HEIGHT * TILE_TOKENS, here);
const int begin = work.begin_channel, rest = C - begin - channel;
const int leaves = (work.end_channel - begin + LEAF - 1) / LEAF * N;
const bool once = STAGE == N * PART_BLOCKS && M <= TILES * TILE_COLUMNS;  // phi is put there
// A turn's first leaves are on their way before the last turn ends, in the slots where they belong.
const bool flows = once && leaves % (AHEAD + !AHEAD) == 0;
const auto slots = &factors[STAGE * FACTOR + simdgroup * AHEAD * SLOT];

for (int64_t turn = work.begin; turn < T; turn += work.step) {
    const int64_t first = turn + simdgroup * HEIGHT * TILE_TOKENS, next = first + work.step;
    const auto starts = starts_of<HEIGHT>(x + begin + channel, first, T, K, lane);

    for (int column = 0; column < M; column += TILES * TILE_COLUMNS) {
        auto sums = no_sums<TILES, HEIGHT>();
        UNROLL for (int leaf = 0; leaf < AHEAD; leaf++)
            if (ALIGNED && (!flows || turn == work.begin))
                start_leaf<N, AT_ONCE>(Row(), slots + leaf * SLOT, starts, C, leaf, rest, lane);
        for (int leaf = 0; leaf < leaves; leaf++) {
            const int block = leaf * AT_ONCE, place = block % STAGE;
            if (place == 0 && (!once || turn == work.begin))
                put_phi<N, AT_ONCE, TILES, 2>(&factors[0], Row(), phi, K, M, C, column, begin, block,
                                              STAGE, here);
            Rows<Row, AT_ONCE, HEIGHT> rows;
            if (ALIGNED && AHEAD) {
                const int ahead = leaf + AHEAD;
                const auto slot = slots + leaf % (AHEAD + !AHEAD) * SLOT;
                end_copies<AHEAD - !!AHEAD>();
                SIMD_BARRIER;
                rows = take_leaf<AT_ONCE, HEIGHT>(Row(), slot, lane);
                SIMD_BARRIER;
                if (ahead < leaves)
                    start_leaf<N, AT_ONCE>(Row(), slot, starts, C, ahead, rest, lane);
                else if (flows && next < T)
                    start_leaf<N, AT_ONCE>(
                        Row(), slot, starts_of<HEIGHT>(x + begin + channel, next, T, K, lane), C,
                        ahead - leaves, rest, lane);
                else
                    mark_copies();
            } else {
                rows = load_leaf<N, AT_ONCE>(starts, C, leaf, rest);
            }
            TOGETHER;
            sums = add_leaf(sums, rows,
                            shared_factors<TILES>(Row(), &factors[place * FACTOR], lane));
        }
        store_sums(parts, first, T, work.parts, work.part, sums, column, M, lane);
    }
}
