// A GPU thread is a fiber with its own stack, which switches at barriers and simd operations.
#pragma once
#include "abi.h"

// Saves the callee-saved registers, stores the stack pointer in *from, continues at `to`.
MHC_INTERNAL void mhc_switch(void** from, void* to);
MHC_INTERNAL void mhc_fiber_start();

#if defined(__x86_64__)
asm(R"(
.text
.hidden mhc_switch
.globl mhc_switch
mhc_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
static void* new_fiber(u8* top) {
    u64* stack = (u64*)((u64)top & ~15ull);
    *--stack = 0;  // the return address of a function that never returns; aligns the stack
    *--stack = (u64)&mhc_fiber_start;
    for (int i = 0; i < 6; i++) *--stack = 0;
    return stack;
}
#elif defined(__aarch64__)
asm(R"(
.text
.hidden mhc_switch
.globl mhc_switch
mhc_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
static void* new_fiber(u8* top) {
    u64* stack = (u64*)((u64)top & ~15ull) - 20;
    for (int i = 0; i < 20; i++) stack[i] = 0;
    stack[11] = (u64)&mhc_fiber_start;  // x30, where mhc_switch returns to
    return stack;
}
#else
#error "the simulator switches fibers on x86-64 and aarch64 only"
#endif
