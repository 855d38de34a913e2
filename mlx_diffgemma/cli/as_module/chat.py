"""Run the chat command: python -m mlx_diffgemma.chat."""

from mlx_diffgemma.cli.chat import main

if __name__ == "__main__":
    main()
