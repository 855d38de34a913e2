"""Run the fuse command: python -m mlx_diffgemma.fuse."""

from mlx_diffgemma.cli.fuse import main

if __name__ == "__main__":
    main()
