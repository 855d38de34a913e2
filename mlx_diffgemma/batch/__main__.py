"""Run the batch command: python -m mlx_diffgemma.batch."""

from mlx_diffgemma.cli.batch import main

if __name__ == "__main__":
    main()
