// layout

#pragma once

enum {
    TILE_TOKENS = 16,  // that a simdgroup multiplies at a time, with TILE_COLUMNS of phi
    STEP_CHANNELS = 32,
    SPLIT_CHANNELS = 256,
    SPLIT_STEPS = SPLIT_CHANNELS / STEP_CHANNELS  // of one stream
};
