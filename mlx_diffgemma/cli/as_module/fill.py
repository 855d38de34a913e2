"""Run the fill command: python -m mlx_diffgemma.fill."""

from mlx_diffgemma.cli.fill import main

if __name__ == "__main__":
    main()
