// Functions that have a fast form in Metal.

#pragma once

#include "words.h"

// The functions by the names that the Metal dialect needs, for floats.
// Each is in a block of its own, so that a text has only those that it calls.
namespace precise {
FUNCTION float exp(float v) { return ::exp(v); }
}  // namespace precise
namespace precise {
FUNCTION float log(float v) { return ::log(v); }
}  // namespace precise
namespace precise {
FUNCTION float sqrt(float v) { return ::sqrt(v); }
}  // namespace precise
namespace precise {
FUNCTION float max(float u, float v) { return ::max(u, v); }
}  // namespace precise
namespace precise {
FUNCTION float min(float u, float v) { return ::min(u, v); }
}  // namespace precise
