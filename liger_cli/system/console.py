"""What is said on a terminal, by liger and by the libraries it runs."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from liger_cli.system.escape import printable

LENGTHS = ("transformers.tokenization_utils_base", "transformers.generation.stopping_criteria")
ADVICE = ("will result in indexing errors", "exceeded the model's predefined maximum length")


@contextmanager
def without_length_advice() -> Iterator[None]:
    """Within, transformers does not warn of texts that are longer than a model was made for: rows are cut out of long
    texts, and where one goes beyond the base's context liger says so itself."""

    def passes(record: logging.LogRecord) -> bool:
        return not any(advice in str(record.msg) for advice in ADVICE)

    loggers = [logging.getLogger(name) for name in LENGTHS]
    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)


def say(sentence: str) -> None:
    """A line for the user, on stderr, whatever it quotes."""
    print(f"liger: {printable(sentence)}", file=sys.stderr)
