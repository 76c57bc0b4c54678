"""`python -m liger_cli` is `liger`."""

from liger_cli.main import main

if __name__ == "__main__":
    main()
