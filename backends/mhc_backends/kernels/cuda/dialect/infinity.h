// Minus infinity, the maximum of no numbers.

#pragma once

#define MINUS_INFINITY __uint_as_float(0xff800000u)
