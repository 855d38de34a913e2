"""Run the edit command: python -m mlx_diffgemma.edit."""

from mlx_diffgemma.cli.edit import main

if __name__ == "__main__":
    main()
