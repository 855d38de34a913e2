"""Constraints on the strings that a canvas may hold. Knows no model."""
