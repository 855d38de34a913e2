"""Conversion between text and token ids. Knows no model."""
