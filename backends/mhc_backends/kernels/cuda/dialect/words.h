// The words that every kernel is written in, for mx.fast.cuda_kernel; metal/dialect has files with
// the same names and words.
//
// MLX has included cuda_fp16.h, cuda_bf16.h and cooperative_groups.h before this text. It is for
// GPUs from compute capability 8.0 on, whose tensor cores take bfloat16 and parts of floats.

#pragma once

#define FUNCTION __device__ __forceinline__
#define BARRIER __syncthreads()
#define UNROLL _Pragma("unroll")
// a pointer to any memory is like any other (`device` is a word in the definition of __device__)
#define DEVICE
#define threadgroup
typedef unsigned uint;
