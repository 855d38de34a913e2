"""python -m mlx_diffgemma.generate: the command."""

from mlx_diffgemma.cli.generate import main

if __name__ == "__main__":
    main()
