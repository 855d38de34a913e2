"""Run the info command: python -m mlx_diffgemma.info."""

from mlx_diffgemma.cli.info import main

if __name__ == "__main__":
    main()
