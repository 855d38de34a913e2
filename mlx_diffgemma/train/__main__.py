"""python -m mlx_diffgemma.train: the command."""

from mlx_diffgemma.cli.train import main

if __name__ == "__main__":
    main()
