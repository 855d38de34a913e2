"""Token ids -> token ids: the denoising loop and its parts. Knows no text."""
