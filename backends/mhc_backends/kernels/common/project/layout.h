// The sum tree: sums over n C follow it, whatever the batch or the launch.
//
// - A K step is 32 channels of one stream.
// - A K block is one K step or several consecutive ones. It is multiplied on its own.
// - A split is 256 channels of all streams. Its K steps are ordered: RUN of the first stream, RUN
//   of the second one and so on, then the next channels.
// - A split-K partial is the sum of a split's K blocks, added one by one.
//
// The kernels that end the projection add the partials, one by one (../partials.h).
// docs/images/sum-tree.svg draws this.

#pragma once

enum {
    TILE_TOKENS = 16,  // tokens that a simdgroup multiplies at a time, with TILE_COLUMNS of phi
    STEP_CHANNELS = 32,
    SPLIT_CHANNELS = 256,
    SPLIT_STEPS = SPLIT_CHANNELS / STEP_CHANNELS  // of one stream
};
