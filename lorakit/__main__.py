"""``python -m lorakit``."""

from lorakit.cli import main

if __name__ == "__main__":
    main()
