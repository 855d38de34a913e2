"""What a run looks like from outside: numbers, JSON objects, the trace page."""
