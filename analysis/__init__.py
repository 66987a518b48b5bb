"""What loss curves say: the paper's analysis, as pure functions over one tidy table. No JAX, no Matplotlib, no W&B."""
