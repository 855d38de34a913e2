"""Checks that this machine computes right, and measurements of how fast it is."""
