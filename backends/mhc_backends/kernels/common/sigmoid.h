// The sigmoid.

#pragma once

#include "dialect/precise.h"
#include "dialect/words.h"

// 1 / (1 + exp(-z)), exact far below zero and without overflow
FUNCTION float sigmoid(float z) {
    const float small = precise::exp(z < 0.0f ? z : -z);
    return (z < 0.0f ? small : 1.0f) / (1.0f + small);
}
