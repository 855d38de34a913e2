"""python -m mlx_diffgemma.fill: the command."""

from mlx_diffgemma.cli.fill import main

if __name__ == "__main__":
    main()
