"""`python -m liger_cli` is `liger`. Signals are looked after first: the imports take a moment."""

import codecs
import os
import sys

from liger_cli.system import interrupts


def main() -> None:
    """Entry point of the `liger` script."""
    interrupts.quit_at_once()
    _speak_utf8()
    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]  # some batch systems set it; in no columns rich would print nothing
    from liger_cli.main import main as run

    run()


def _speak_utf8() -> None:
    """In a locale of ASCII alone start again in Python's UTF-8 mode: names of files would come out as surrogates.

    A character that the user's own encoding lacks is printed as a question mark.
    """
    ascii_only = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if ascii_only and not sys.flags.utf8_mode and sys.executable and sys.orig_argv:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    if sys.stdout is not None and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


if __name__ == "__main__":
    main()
