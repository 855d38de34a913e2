"""Text <-> token ids. Knows nothing of the model."""
