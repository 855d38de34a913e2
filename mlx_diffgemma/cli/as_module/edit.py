"""python -m mlx_diffgemma.edit: the command."""

from mlx_diffgemma.cli.edit import main

if __name__ == "__main__":
    main()
