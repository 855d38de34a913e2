"""Which strings a canvas may hold. Knows nothing of the model."""
