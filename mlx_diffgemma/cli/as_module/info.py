"""python -m mlx_diffgemma.info: the command."""

from mlx_diffgemma.cli.info import main

if __name__ == "__main__":
    main()
