"""Training: the objective that the model was made with, adapters or all weights, exact resume."""
