"""Where a base comes from: a local folder, or the hub (huggingface_hub is imported only for that)."""

import re
from dataclasses import dataclass
from pathlib import Path

from liger_cli.checkpoint.gguf import is_gguf
from liger_cli.checkpoint.paper_folders import as_base
from liger_cli.checkpoint.reader import (
    ADAPTER_CONFIG,
    INDEX,
    TOKENIZER_NAMES,
    WEIGHTS,
    read_config,
    read_json,
    refuse_adapter,
    supported_family,
)
from liger_cli.system.errors import SetupError, UsageError

HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
FILE = re.compile(r"\.(gguf|safetensors|bin|pth?|ckpt|json|zip|gz|onnx)$", re.IGNORECASE)  # no name of a model
SNAPSHOT = re.compile(r"models--(?P<id>[\w.-]+)/snapshots/(?P<revision>[\w.-]+)", re.ASCII)
SMALL_FILES = ("config.json", ADAPTER_CONFIG, INDEX, "README.md", *sorted(TOKENIZER_NAMES), "*.model", "*.model.v*",
               "*LICENSE*", "*License*", "*license*", "*LICENCE*", "*NOTICE*", "*COPYING*", "*USE_POLICY*",
               "additional_chat_templates/*.jinja")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A base's folder and what it is called.

    Attributes:
        folder: where its files are.
        name: hub id where that is known, else the folder's name.
        revision: commit of the hub, None for a plain folder.
    """

    folder: Path
    name: str
    revision: str | None

    @property
    def short_name(self) -> str:
        return self.name.rpartition("/")[2]


def find_base(base: str, revision: str | None = None, experimental: bool = False) -> Source:
    """The folder of a local path, or of a hub id, which is downloaded where it is not in the cache.

    Raises:
        UsageError: neither a folder nor a hub id, or a revision of a local folder.
        SetupError: the hub cannot be reached, or does not give the model.
        ModelError: the model on the hub cannot be converted (found out before its weights are downloaded).
    """
    folder = Path(base).expanduser()
    if folder.is_file() and is_gguf(base):
        raise UsageError(f"{base} is a GGUF file; `liger convert {base}` makes folders of it, of which name one here")
    if folder.exists():
        if revision is not None:
            raise UsageError(f"--revision is for models of the hub, and {base} is a local path; leave it away")
        return _local(folder)
    if not HUB_ID.fullmatch(base) or FILE.search(base):
        raise UsageError(f"{base} does not exist; give a model's folder or a hub id such as Qwen/Qwen3-8B")
    folder = _download(base, revision, SMALL_FILES)
    supported_family(as_base(read_config(folder.resolve()))[0], base, experimental)
    refuse_adapter(folder, base)
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        weights = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
    else:
        weights = [WEIGHTS]
    folder = _download(base, revision, [*SMALL_FILES, *weights])
    return Source(folder, base, _local(folder).revision or revision)


def _local(folder: Path) -> Source:
    folder = folder.resolve()
    if match := SNAPSHOT.fullmatch("/".join(folder.parts[-3:])):
        return Source(folder, match["id"].replace("--", "/"), match["revision"])
    return Source(folder, folder.name, None)


def _download(hub_id: str, revision: str | None, patterns) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision {revision}" if revision else ""
        raise SetupError(
            f"{hub_id}{at} is no folder here and could not be had from the hub ({reason}); check the name, the network "
            "and your access, or give a local folder"
        ) from error


def spare_retries() -> None:
    """Without network, switch `datasets` to its cache: its retries would take most of a minute before they fail."""
    import datasets

    if not reachable():
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


def reachable() -> bool:
    """Whether the hub can be reached; taken for granted behind a proxy, where a connection of our own tells nothing."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return True
    address = urlsplit(ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=5):
            return True
    except OSError:
        return False
