"""Run the models command: python -m mlx_diffgemma.models."""

from mlx_diffgemma.cli.models import main

if __name__ == "__main__":
    main()
