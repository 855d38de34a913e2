"""Run the serve command: python -m mlx_diffgemma.serve."""

from mlx_diffgemma.cli.serve import main

if __name__ == "__main__":
    main()
