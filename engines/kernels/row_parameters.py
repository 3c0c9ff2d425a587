"""Where a slot's sampling parameters stand in its line of int32 that the drawing kernels read."""

SEED, CHOICE, PROMPT_LENGTH, TOP_K = 0, 2, 3, 4
"""The seed takes two places, its low half first."""
TEMPERATURE, TOP_P, MIN_P = 5, 6, 7
"""Bits of a float32."""
FIELDS = 8
GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow float32."""
