"""Configuration and settings from files and users, each checked once. Imports no mlx."""
