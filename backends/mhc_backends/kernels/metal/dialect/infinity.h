// The largest of no numbers.

#pragma once

#define MINUS_INFINITY (-INFINITY)
