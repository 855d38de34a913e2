"""The rows of many jobs together, over one model, on one thread. Knows no task."""
