// The structs that Python and the runtime exchange; engine.py mirrors them field by field.
// The runtime is freestanding: it includes no system header, so that a bare clang builds it.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define MHC_EXPORT extern "C" __attribute__((visibility("default")))
#define MHC_INTERNAL extern "C" __attribute__((visibility("hidden")))

// Metal's limits; every Apple GPU family that MLX supports has these.
enum : u32 { MAX_THREADS = 1024, SIMD_WIDTH = 32, MAX_SIMDGROUPS = MAX_THREADS / SIMD_WIDTH };

// The accesses to one byte (threadgroup memory) or one element (device memory) since the last
// barrier that ordered them. Two readers are enough to find every conflicting writer: see race.h.
struct Cell {
    u32 write_epoch, write_simd_epoch;
    u32 read_epoch, read_simd_epoch;
    u16 writer, reader, other_reader;
    u16 read_before;  // read in an earlier threadgroup
};

// One argument [[buffer(i)]].
struct Buffer {
    u8* data;
    u8* pointer;  // what the kernel gets; within `data`, or at its start
    u64 size;
    u32 element_shift;  // log2 of the element size
    u32 writable, initialised;
    u64* loaded_bits;  // one bit per byte
    u64* stored_bits;
    Cell* cells;  // one per element of a writable buffer
    u64 loaded, stored, loaded_unique, stored_unique;
};

enum FaultKind : u32 {
    NO_FAULT,
    OUT_OF_BOUNDS,
    MISALIGNED,
    RACE,
    UNWRITTEN_READ,
    DIVERGENCE,
    WILD_ACCESS,
    INDEX_OUT_OF_BOUNDS,
    DIVISION_BY_ZERO,
    INPUT_WRITTEN,
    MISSING_LANE,
};

enum Space : u32 { SPACE_NONE, SPACE_BUFFER, SPACE_THREADGROUP };

enum : u32 { NOBODY = 0xffff };
enum : u32 { MAX_BRANCHES = 2048 };

struct Fault {
    u32 kind, space, array, size;  // array: index of the buffer or of the threadgroup array
    i64 offset;                    // in bytes from the start of that array
    u32 write, other_write;
    u32 group[3];
    u32 thread, other;  // linear positions in the threadgroup; other may be NOBODY
    u32 line, column, other_line, other_finished;
    u64 address;       // the caller, relative to the library's image
    const char* text;  // a type's name, where the compiler gave one
};

struct Launch {
    Buffer* buffers;
    u64 buffer_count;
    u8* arena;  // holds every buffer, with gaps between them
    u64 arena_size;
    const u16* page_owner;  // the nearest buffer of each 4 KiB page of the arena
    u8* stacks;
    u64 stack_size;
    u32 grid[3], group[3];
    u32 order, seed;  // 0 forward, 1 reversed, 2 random
    u8* marks;        // of each branch: 1 it was true, 2 false, 4 true again in the next turn
    Fault fault;
};

// A `threadgroup T x[N]` of the kernel, registered while the library is loaded.
struct SharedArray {
    const char* name;
    u64 size, offset;
};
