"""Training of adapters or all weights, with the model's own objective and exact resume."""
