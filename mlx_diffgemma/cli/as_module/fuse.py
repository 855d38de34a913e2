"""python -m mlx_diffgemma.fuse: the command."""

from mlx_diffgemma.cli.fuse import main

if __name__ == "__main__":
    main()
