"""The denoising loop and its parts: token ids in, token ids out. Knows no text."""
