"""From saved logs to every figure: pure functions over one tidy table; no JAX, no training, no W&B."""
