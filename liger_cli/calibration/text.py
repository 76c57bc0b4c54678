"""The text that a calibration reads, as token ids, and what it says at its end. No torch at the top."""

from dataclasses import dataclass
from pathlib import Path

from liger_cli.conversion.requests import OWN
from liger_cli.system.errors import LigerError, UsageError

OWN_TEXT = "text that the base wrote itself"


@dataclass(frozen=True)
class Text:
    """Token ids of documents one behind another, and what the text is called in a report.

    Attributes:
        ids: [N] int64.
        beside_prose: shipped prose is half of the rows: documents that are short show little of what lies far back.
    """

    name: str
    ids: object
    beside_prose: bool = False

    def rows(self, length: int):
        """As many whole rows as there are, [R, length]. Raises LigerError: not even one."""
        import torch

        ids = torch.as_tensor(self.ids, dtype=torch.int64)
        if len(ids) < length:
            raise LigerError(f"{self.name} has {len(ids):,} tokens, less than one row of {length}")
        return ids[: len(ids) // length * length].view(-1, length)


def check_data(data: str | Text | None) -> None:
    """Raises UsageError where a text to calibrate on is no file."""
    if isinstance(data, str) and data != OWN and not Path(data).is_file():
        raise UsageError(f"--calibration-data {data} is not a file; name a text or a .jsonl file, or {OWN}")


def data_name(data: str) -> str:
    """What a report calls a text to calibrate on."""
    return OWN_TEXT if data == OWN else Path(data).name


def calibration_note(report: dict) -> str:
    """One sentence on what a calibration gave.

    Args:
        report: as `calibrate.calibrate` gives it, or the section of a liger.json, whatever stands there.
    """

    def number(name: str, form: str) -> str:
        value = report.get(name)
        return format(value, form) if type(value) in (int, float) else "an unknown number"

    took = f" in {number('seconds', '.0f')} s" if "seconds" in report else ""
    return (
        f"calibrated on {number('tokens', ',')} tokens of {str(report.get('text'))[:500]}{took}: on "
        f"{number('held_out_tokens', ',')} tokens of {str(report.get('held_out'))[:500]}, in rows of "
        f"{number('held_out_seq_len', ',')}, the KL divergence from the base is {number('kl', '.4f')} nats a token; "
        f"the window alone has {number('window_only_kl', '.4f')}, and a window of the same bytes "
        f"({number('same_bytes_window', ',')} tokens) {number('same_bytes_kl', '.4f')}"
    )
