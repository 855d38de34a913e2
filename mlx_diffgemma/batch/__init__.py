"""Many requests from a file: read line by line, answered together, written in their order."""
