// Sums over n C go by one tree, whatever the batch or the launch. A K step is 32 channels of one
// stream. A split is 256 channels of all streams: RUN K steps of the first stream, as many of the
// second one and so on, then the next channels. Its K blocks, of one K step or some that follow one
// another, are multiplied by themselves and their sums added one by one: that is a split-K partial.
// The kernels that end the projection add the partials, one by one (../partials.h).
// docs/images/sum-tree.svg draws this.

#pragma once

enum {
    TILE_TOKENS = 16,  // that a simdgroup multiplies at a time, with TILE_COLUMNS of phi
    STEP_CHANNELS = 32,
    SPLIT_CHANNELS = 256,
    SPLIT_STEPS = SPLIT_CHANNELS / STEP_CHANNELS  // of one stream
};
