"""``python -m swapless``: the command ``swapless``."""

from swapless.cli.main import main

if __name__ == "__main__":
    main()
