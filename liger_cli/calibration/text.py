"""The text that a calibration reads, as token ids."""

from dataclasses import dataclass

from liger_cli.system.errors import LigerError


@dataclass(frozen=True)
class Text:
    """Token ids of documents one behind another, and what the text is called in a report."""

    name: str
    ids: object  # [N] int64

    def rows(self, length: int):
        """As many whole rows as there are, [R, length]. Raises LigerError: not even one."""
        import torch

        ids = torch.as_tensor(self.ids, dtype=torch.int64)
        if len(ids) < length:
            raise LigerError(f"{self.name} has {len(ids):,} tokens, less than one row of {length}")
        return ids[: len(ids) // length * length].view(-1, length)
