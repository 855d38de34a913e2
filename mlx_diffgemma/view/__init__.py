"""Views of a run: its numbers, JSON objects and the trace page."""
