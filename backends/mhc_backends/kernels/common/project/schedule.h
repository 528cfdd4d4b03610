// schedule

#pragma once

#include "layout.h"
#include "dialect/words.h"

// What a threadgroup takes of the products with phi: a part, and tokens from `begin` on in turns, each
// `step` after the last one. All threadgroups move through the tokens together.
struct Schedule {
    int partials, split, begin_channel, end_channel;
    int64_t begin, step;
};

FUNCTION Schedule schedule_of(int C, int tokens, Position here) {
    Schedule out;
    out.partials = (C + SPLIT_CHANNELS - 1) / SPLIT_CHANNELS;
    out.split = here.group_x % out.partials;
    out.begin_channel = out.split * SPLIT_CHANNELS;
    out.end_channel = out.begin_channel + SPLIT_CHANNELS < C ? out.begin_channel + SPLIT_CHANNELS : C;
    out.begin = int64_t(here.group_x / out.partials) * tokens;
    out.step = int64_t(here.groups_x / out.partials) * tokens;
    return out;
}
