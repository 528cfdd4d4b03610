// The split and the tokens of a persistent threadgroup.

#pragma once

#include "../position.h"
#include "layout.h"
#include "dialect/words.h"

// A threadgroup takes one split. It iterates over the tokens, from `begin` on in steps of `step`.
// All threadgroups move through the tokens together.
struct Schedule {
    int splits, split, begin_channel, end_channel;
    int64_t begin, step;
};

FUNCTION Schedule schedule_of(int C, int tokens, Position here) {
    Schedule out;
    out.splits = (C + SPLIT_CHANNELS - 1) / SPLIT_CHANNELS;
    out.split = here.group_x % out.splits;
    out.begin_channel = out.split * SPLIT_CHANNELS;
    out.end_channel =
        out.begin_channel + SPLIT_CHANNELS < C ? out.begin_channel + SPLIT_CHANNELS : C;
    out.begin = int64_t(here.group_x / out.splits) * tokens;
    out.step = int64_t(here.groups_x / out.splits) * tokens;
    return out;
}
