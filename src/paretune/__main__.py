"""`python -m paretune`."""

from paretune.cli.app import main

if __name__ == "__main__":
    main()
