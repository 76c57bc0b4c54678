"""Data-parallel processes: what a process knows of the others, by torch's environment variables, and starting them."""

import os
import subprocess
import sys

from liger_cli.system.errors import LigerError


def is_main_process() -> bool:
    """Whether this process prints and writes: the only one, or rank 0 of several."""
    return int(os.environ.get("RANK", "0")) == 0


def is_launched() -> bool:
    """Whether a launcher of torch or accelerate started this process."""
    return "RANK" in os.environ


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch(processes: int) -> dict:
    """Run this same command in `processes` processes. Raises LigerError where one of them fails."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    launcher = subprocess.Popen([*command, "-m", "liger_cli", *sys.argv[1:]])
    try:
        returncode = launcher.wait()
    except BaseException:
        launcher.terminate()  # which it passes on to the processes
        launcher.wait()
        raise
    if returncode:
        raise LigerError(f"one of the {processes} processes failed; its message is above")
    return {}
