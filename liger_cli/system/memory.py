"""Peak memory of a piece of work: the allocator's own count on CUDA, the process's high-water mark on Linux."""

import ctypes
from contextlib import suppress
from pathlib import Path

CLEAR_REFS, RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # Linux, proc(5): resets VmHWM
STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")


class PeakMemory:
    """Bytes held at most since `start`, weights included; None where the system cannot tell.

    On CUDA that is what torch allocated. On a CPU it is `weights` and what the process's resident memory grew by: the
    interpreter and its libraries are left out.
    """

    def __init__(self, device: str, weights: int):
        self.cuda = device.startswith("cuda")
        self.device = device
        self.weights = weights
        self.before: int | None = None

    def start(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        self.before = None
        with suppress(OSError):
            CLEAR_REFS.write_text(RESET_PEAK)
            self.before = _kilobytes(STATUS, "VmRSS")

    def stop(self) -> int | None:
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        peak = None if self.before is None else _kilobytes(STATUS, "VmHWM")
        return None if peak is None or self.before is None else self.weights + max(peak - self.before, 0)


def available(device: str) -> int | None:
    """Bytes that can still be allocated, None where the system cannot tell; on `cuda`, on all such devices together."""
    if device.startswith("cuda"):
        import torch

        several = range(torch.cuda.device_count()) if device == "cuda" else [device]
        return sum(torch.cuda.mem_get_info(one)[0] for one in several)
    return _kilobytes(MEMINFO, "MemAvailable")


def _kilobytes(path: Path, name: str) -> int | None:
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return None
