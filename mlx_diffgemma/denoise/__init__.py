"""The denoising loop and its parts, from token ids to token ids. Knows no text."""
