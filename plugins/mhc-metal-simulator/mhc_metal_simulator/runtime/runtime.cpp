// The runtime of the simulator, one per compiled kernel: its state belongs to that kernel alone,
// and Python lets one launch at a time into it.
#include "softfloat.h"
#include "undefined.h"

static u64 count_bits(const u64* bits, u64 size) {
    u64 count = 0;
    for (u64 i = 0; i < (size + 63) / 64; i++) count += __builtin_popcountll(bits[i]);
    return count;
}

// Runs the grid once. Returns 0, or 1 with launch->fault filled in.
MHC_EXPORT u32 mhc_launch(Launch* launch) {
    m.launch = launch;
    for (u64 i = 0; i < launch->buffer_count; i++) m.buffers[i] = launch->buffers[i].pointer;
    const bool good = run_grid();
    for (u64 i = 0; i < launch->buffer_count; i++) {
        Buffer& buffer = launch->buffers[i];
        buffer.loaded_unique = count_bits(buffer.loaded_bits, buffer.size);
        buffer.stored_unique = count_bits(buffer.stored_bits, buffer.size);
    }
    return good ? 0 : 1;
}
