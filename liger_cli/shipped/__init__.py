"""The project's own small base model (text generator, training script, probes, checkpoint), and some real prose.

`BASE_DIR` is the checkpoint folder, loaded with `AutoModelForCausalLM.from_pretrained(BASE_DIR)`.
"""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"
CONTEXT_LENGTH = 1024  # the longest sequences the base was trained on, in tokens
PROSE_DIR = Path(__file__).parent / "prose"


def prose() -> list[str]:
    """Two documents of real prose in the public domain, some 57,000 tokens in all; see `prose/README.md`."""
    return [(PROSE_DIR / name).read_text("utf-8") for name in ("moby-dick.txt", "opticks.txt")]
