//

#pragma once

#define MINUS_INFINITY (-INFINITY)
