/* The kernels for one instruction set: included once a variant with VARIANT (the table), VECTOR_LANES,
 * TILE_ROWS and QUANTIZED_ROWS (rows that one pass over a panel serves) defined and the instruction set switched on. */
#include "attention.h"
#include "elementwise.h"
#include "gemm.h"
#include "quantized.h"
#include "sampling.h"

const KernelTable VARIANT = {
    .lanes = VECTOR_LANES,
    .panel_width = PANEL_WIDTH,
    .tile_rows = TILE_ROWS,
    .pack_panels = pack_panels,
    .linear = linear,
    .attention_workspace = attention_workspace,
    .attention = attention,
    .norm = norm,
    .silu_mul = silu_mul,
    .rope = rope,
    .write_cache = write_cache,
    .embed = embed,
    .gumbel = gumbel,
    .quantized_linear = quantized_linear,
    .argmax = argmax,
};
