"""``python -m blip2``: the same as the command ``blip2``."""

from blip2.cli import main

if __name__ == "__main__":
    main()
