"""Run the generate command: python -m mlx_diffgemma.generate."""

from mlx_diffgemma.cli.generate import main

if __name__ == "__main__":
    main()
