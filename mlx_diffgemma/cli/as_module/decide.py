"""Run the decide command: python -m mlx_diffgemma.decide."""

from mlx_diffgemma.cli.decide import main

if __name__ == "__main__":
    main()
