"""Examination of this machine: what it is, whether MLX computes right on it, and how fast it would
run the published model."""
