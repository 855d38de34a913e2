"""python -m mlx_diffgemma.convert: the command."""

from mlx_diffgemma.cli.convert import main

if __name__ == "__main__":
    main()
