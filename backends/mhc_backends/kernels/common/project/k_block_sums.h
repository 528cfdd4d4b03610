// Sums of K blocks in memory: blocks[T, B, WIDTH], where the K blocks of all splits follow each
// other.

#pragma once

#include "../floats.h"
#include "../load.h"
#include "../position.h"
#include "dialect/words.h"

// The numbers of a K block: M products, numbers without a meaning up to a multiple of 4, then one
// sum of squares for each of the four lanes that hold a row.
template <int M>
struct BlockSums {
    enum { SQUARES = (M + 3) / 4 * 4, WIDTH = SQUARES + 4 };
};

// The sums of a split's BLOCKS K blocks, of which `left` are there, added one by one: four numbers of
// each, from `from` on.
template <int BLOCKS, int WIDTH, typename P>
FUNCTION Floats<4> sum_k_blocks(P from, int left) {
    enum { AT_ONCE = BLOCKS < 16 ? BLOCKS : 16 };  // loads in flight
    Floats<4> sum = zeros<4>();
    for (int begin = 0; begin < BLOCKS && begin < left; begin += AT_ONCE) {
        Floats<4> some[AT_ONCE];
        UNROLL for (int k = 0; k < AT_ONCE; k++)
            some[k] = begin + k < left ? load<4>(from + (begin + k) * WIDTH) : zeros<4>();
        UNROLL for (int k = 0; k < AT_ONCE; k++)
            sum = plus(sum, some[k]);
    }
    return sum;
}

// Sums the K blocks of `splits` splits to split-K partials, partials[splits, M + 1]. `blocks`
// points to the first K block, and `left` are there. All threads must come here, and a BARRIER must
// follow.
template <int M, int BLOCKS, typename P, typename S>
FUNCTION void sum_splits(P blocks, int left, int splits, S partials, Position here) {
    enum { WIDTH = BlockSums<M>::WIDTH, FOURS = WIDTH / 4 };
    for (int item = here.id; item < splits * FOURS; item += here.threads) {
        const int split = item / FOURS, first = item % FOURS * 4;
        const Floats<4> sum = sum_k_blocks<BLOCKS, WIDTH>(blocks + split * (BLOCKS * WIDTH) + first,
                                                          left - split * BLOCKS);
        const auto own = partials + split * (M + 1);
        if (first == BlockSums<M>::SQUARES) {
            own[M] = (sum.at[0] + sum.at[1]) + (sum.at[2] + sum.at[3]);
        } else {
            UNROLL for (int k = 0; k < 4; k++)
                if (first + k < M) own[first + k] = sum.at[k];
        }
    }
}

// The sum of a token's `count` K blocks in one of its M + 1 columns, of which the last has the
// squares. `blocks` points to the first K block. SPLITS splits are added at a time, in
// `sums`[SPLITS, M + 1]. All threads must come here, and may use `sums` again after it.
template <int M, int BLOCKS, int SPLITS, typename P>
FUNCTION float sum_all_splits(P blocks, int count, int column, threadgroup float* sums,
                              Position here) {
    enum { AT_ONCE = 8 };  // partials that a thread reads before it adds the first
    const int splits = (count + BLOCKS - 1) / BLOCKS;
    float total = 0.0f;
    for (int begin = 0; begin < splits; begin += SPLITS) {
        const int some = splits - begin < SPLITS ? splits - begin : SPLITS;
        sum_splits<M, BLOCKS>(blocks + begin * BLOCKS * BlockSums<M>::WIDTH, count - begin * BLOCKS,
                              some, sums, here);
        BARRIER;
        for (int split = 0; split < some; split += AT_ONCE) {
            Floats<AT_ONCE> next;
            UNROLL for (int k = 0; k < AT_ONCE; k++)
                next.at[k] = split + k < some ? sums[(split + k) * (M + 1) + column] : 0.0f;
            UNROLL for (int k = 0; k < AT_ONCE; k++)
                total += next.at[k];
        }
        BARRIER;  // the next splits, or tokens, use sums again
    }
    return total;
}
