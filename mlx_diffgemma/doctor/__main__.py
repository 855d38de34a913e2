"""Run the doctor command: python -m mlx_diffgemma.doctor."""

from mlx_diffgemma.cli.doctor import main

if __name__ == "__main__":
    main()
