// What texts in the CUDA dialect need to run on a CPU: what CUDA's headers have, threads as fibers that
// take turns at barriers, and the tensor core's instructions, written out as the PTX ISA has them (9.7.14,
// "Matrix multiply-accumulate"). cuda_on_cpu.py puts C++ in the place of the dialect's PTX.
#pragma once

#include <immintrin.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

// ---- addresses, which are all of one kind here ------------------------------------------------------

template <typename P>
static size_t __cvta_generic_to_global(P p) {
    return size_t(p);
}
template <typename P>
static size_t __cvta_generic_to_shared(P p) {
    return size_t(p);
}

// ---- threads -------------------------------------------------------------------------------------

struct Dim3 {
    unsigned x, y, z;
};
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct Barrier {
    unsigned count, waiting, turn;
};
struct Warp {
    Barrier barrier;
    unsigned left[32][4], right[32][2];
    float value[32];
    bool flag[32];
};
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
};
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Barrier whole_block;
static ucontext_t scheduler;
static const std::function<void()>* work;

static int lane() { return int(threadIdx.x % 32); }
static Warp& warp() { return warps[threadIdx.x / 32]; }

static void run_fiber() {
    (*work)();
    fibers[threadIdx.x].done = true;
}
static void wait_at(Barrier& barrier) {
    const unsigned turn = barrier.turn, own = threadIdx.x;
    if (++barrier.waiting == barrier.count) barrier.waiting = 0, barrier.turn++;
    while (barrier.turn == turn) swapcontext(&fibers[own].context, &scheduler);
}
// Runs the threads of a threadgroup to their end.
static void run_block(unsigned threads, const std::function<void()>& kernel) {
    enum { STACK = 1 << 19 };
    work = &kernel;
    whole_block = {threads, 0, 0};
    warps.assign(threads / 32, {});
    for (auto& one : warps) one.barrier.count = 32;
    fibers.resize(threads);
    for (auto& fiber : fibers) {
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run_fiber, 0);
        fiber.done = false;
    }
    for (bool any = true; any;) {
        any = false;
        for (unsigned k = 0; k < threads; k++) {
            if (fibers[k].done) continue;
            any = true;
            threadIdx = {k, 0, 0};
            swapcontext(&scheduler, &fibers[k].context);
        }
    }
}

// ---- what CUDA's headers have --------------------------------------------------------------------

#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __shared__ static
#define __grid_constant__
struct uint1 {
    unsigned x;
};
struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
using std::exp, std::log, std::sqrt, std::fma, std::max, std::min;  // of floats, floats
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <typename To, typename From>
To same_bits(From from) {
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __uint_as_float(unsigned v) { return same_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return same_bits<unsigned>(v); }

// bytes of b : a, chosen by the nibbles of `which`
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
    unsigned out = 0;
    for (int k = 0; k < 4; k++) {
        const unsigned at = which >> 4 * k & 7;
        out |= ((at < 4 ? a : b) >> at % 4 * 8 & 255) << 8 * k;
    }
    return out;
}

static void __syncthreads() { wait_at(whole_block); }
static void __syncwarp() { wait_at(warp().barrier); }
static float __shfl_sync(unsigned, float v, int from) {
    warp().value[lane()] = v;
    __syncwarp();
    const float out = warp().value[from & 31];
    __syncwarp();
    return out;
}
static float __shfl_xor_sync(unsigned mask, float v, int step) {
    return __shfl_sync(mask, v, lane() ^ step);
}
static bool __any_sync(unsigned, bool q) {
    warp().flag[lane()] = q;
    __syncwarp();
    bool out = false;
    for (bool flag : warp().flag) out = out || flag;
    __syncwarp();
    return out;
}

struct __half {
    unsigned short bits;
    __half(float v = 0.0f) : bits(_cvtss_sh(v, 0)) {}
    operator float() const { return _cvtsh_ss(bits); }
};
struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16(float v = 0.0f) {
        const unsigned all = same_bits<unsigned>(v);
        bits = (all & 0x7fffffff) > 0x7f800000 ? 0x7fff : (all + 0x7fff + (all >> 16 & 1)) >> 16;
    }
    operator float() const { return same_bits<float>(unsigned(bits) << 16); }
};
struct __half2 {
    __half low, high;
};
struct __nv_bfloat162 {
    __nv_bfloat16 low, high;
};
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __float2bfloat162_rn(float v) { return {v, v}; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
    return {float(a.low) * float(b.low), float(a.high) * float(b.high)};
}
inline float __half2float(__half v) { return v; }
inline __half __ushort_as_half(unsigned short v) { return same_bits<__half>(v); }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }

// An address that a vector of so many bytes is loaded from or stored to: no GPU takes any other.
static int misaligned;
template <typename P>
P at_vector(P p, int bytes) {
    misaligned += reinterpret_cast<uintptr_t>(p) % bytes != 0;
    return p;
}

// ---- the tensor core -----------------------------------------------------------------------------

// Number k of [16, K] by [K, 8], of a row of the left factor or a column of the right one, as floats.
static float tf32(unsigned v) { return same_bits<float>(v & 0xffffe000u); }
static float bf16(unsigned v, int k) {
    return same_bits<float>(k % 2 ? v & 0xffff0000u : v << 16);
}
template <int K>
static float left_number(int row, int k) {
    const unsigned* own = warp().left[row % 8 * 4 + (K == 8 ? k % 4 : k % 8 / 2)];
    const unsigned v = own[row / 8 + (k >= K / 2 ? 2 : 0)];
    return K == 8 ? tf32(v) : bf16(v, k);
}
template <int K>
static float right_number(int k, int column) {
    const unsigned* own = warp().right[column * 4 + (K == 8 ? k % 4 : k % 8 / 2)];
    return K == 8 ? tf32(own[k >= K / 2]) : bf16(own[k >= K / 2], k);
}
template <int K, typename Sum>
static void tensor_core(Sum& sum, uint4 a, unsigned b0, unsigned b1) {
    memcpy(warp().left[lane()], &a, sizeof(a));
    warp().right[lane()][0] = b0, warp().right[lane()][1] = b1;
    __syncwarp();
    for (int e = 0; e < 4; e++) {
        double all = sum.at[e];
        for (int k = 0; k < K; k++)
            all += double(left_number<K>(lane() / 4 + e / 2 * 8, k)) *
                   right_number<K>(k, lane() % 4 * 2 + e % 2);
        sum.at[e] = float(all);
    }
    __syncwarp();
}
