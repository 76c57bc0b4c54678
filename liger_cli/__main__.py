"""`python -m liger_cli` is `liger`. Signals are looked after first: the imports take a moment."""

from liger_cli import interrupts


def main() -> None:
    """Entry point of the `liger` script."""
    interrupts.quit_at_once()
    from liger_cli.main import main as run

    run()


if __name__ == "__main__":
    main()
