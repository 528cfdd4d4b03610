// The words that all kernels use, for mx.fast.cuda_kernel; metal/dialect has files with the same
// names and words.
//
// MLX includes cuda_fp16.h, cuda_bf16.h and cooperative_groups.h before this text. GPUs need
// compute capability 8.0 or later, whose tensor cores multiply bfloat16 and TF32.

#pragma once

#define FUNCTION __device__ __forceinline__
#define BARRIER __syncthreads()
#define UNROLL _Pragma("unroll")
// CUDA's pointers have no address space (`device` itself is a word in the definition of __device__)
#define DEVICE
#define threadgroup
typedef unsigned uint;
