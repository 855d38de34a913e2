"""HTTP: one file per dialect over one engine per model."""
