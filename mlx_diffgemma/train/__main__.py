"""Run the train command: python -m mlx_diffgemma.train."""

from mlx_diffgemma.cli.train import main

if __name__ == "__main__":
    main()
