"""Run the convert command: python -m mlx_diffgemma.convert."""

from mlx_diffgemma.cli.convert import main

if __name__ == "__main__":
    main()
