"""Configuration and settings: what files and users say, checked once. Imports no mlx."""
