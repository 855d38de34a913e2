"""python -m mlx_diffgemma.models: the command."""

from mlx_diffgemma.cli.models import main

if __name__ == "__main__":
    main()
