"""The project's own small base model: its text generator, training script, held-out evaluation and checkpoint.

`BASE_DIR` is the checkpoint folder, loaded with `AutoModelForCausalLM.from_pretrained(BASE_DIR)`.
"""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"
CONTEXT_LENGTH = 1024  # the longest sequences the base was trained on, in tokens
