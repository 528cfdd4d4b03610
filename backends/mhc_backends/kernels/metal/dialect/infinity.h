// Minus infinity, the maximum of no numbers.

#pragma once

#define MINUS_INFINITY (-INFINITY)
