"""`python -m bamboo`."""

from bamboo.cli import main

if __name__ == "__main__":
    main()
