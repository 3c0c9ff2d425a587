/* The kernels for any machine: vectors of four floats. */
#define VARIANT slim_kernels_base
#define VECTOR_LANES 4
#define TILE_ROWS 4
#define QUANTIZED_ROWS 4
#include "variant.h"
