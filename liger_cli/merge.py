"""`liger merge`: add LoRA adapters into the weights, tensor by tensor, without ever loading the model.

Shards without a trained tensor are linked. In the others every byte is copied as it is, but for the trained weights:
those are read, summed with B A in float32 and rounded once to the base's dtype.
"""

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from liger_cli import publish
from liger_cli.checkpoint import EXTRAS, INDEX, PICKLES, Shard, Tensor, fingerprint, inside, read_config, read_weights
from liger_cli.converted import read_converted
from liger_cli.errors import LigerError, ModelError, UsageError
from liger_cli.escape import code_span, markdown, printable
from liger_cli.folders import resolve_model
from liger_cli.manifest import MANIFEST, new_manifest, read_manifest, write_manifest
from liger_cli.modeling import code_hashes, model_files
from liger_cli.outputs import LINKS, atomic_folder, check_output, copy_file, place, unchanged
from liger_cli.templates.liger_extras import NAMES
from liger_cli.untrusted import read_bytes, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
COPIED = 16 << 20  # bytes copied at a time
REPLACED = ("README.md", MANIFEST, "config.json")
UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "fully trained modules",
    "alora_invocation_tokens": "aLoRA",
    "trainable_token_indices": "trained tokens",
    "lora_bias": "LoRA biases",
}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # of init_lora_weights: the base's weights stay what they are
MAX_ALPHA = 1e6


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, read but for its tensors.

    Attributes:
        scales: name of the weight in the base -> alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
        transposed: the weights are stored [in, out] (`fan_in_fan_out`).
        ranks: name of the weight in the base -> rank of its update.
        replaced: names of the extra tensors (`templates.liger_extras`) that were trained as a whole.
    """

    folder: Path
    manifest: dict | None
    config: dict
    scales: dict[str, float]
    transposed: bool
    ranks: dict[str, int]
    replaced: frozenset[str] = frozenset()

    @property
    def trained(self) -> set[str]:
        """Every tensor of the base that the adapter changes."""
        return set(self.scales) | self.replaced


def run(
    adapters: list[str | Path] | str | Path | None = None,
    *,
    base: str | Path | None = None,
    output: str | Path | None = None,
    dtype: str | None = None,
    link: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> dict:
    """Merge and print what was written.

    Args:
        adapters: folders whose updates are added; the newest adapter here by default.
        base: the converted model; by default the folder that the adapter names.
        output: `<model>-merged` here by default.
        dtype: of all the weights: `float32`, `float16` or `bfloat16`; each tensor's own by default.
        link: how untouched shards get there: `auto`, `hard` or `copy`.
        force: replace an output that liger made.
        dry_run: check, say what would be written, and write nothing.
        push_to_hub: upload the folder to this repository of the hub.
    Returns:
        The report (what `--json` prints).
    Raises:
        UsageError, ModelError (another base, an adapter that is no plain LoRA), OSError.
    """
    if link not in LINKS:
        raise UsageError(f"--link is {link!r}, but has to be one of {', '.join(LINKS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}, but has to be one of {', '.join(DTYPES)}")
    if push_to_hub:
        publish.check(push_to_hub, dry_run)
    given = [adapters] if isinstance(adapters, (str, Path)) else adapters
    folders = [resolve_model(one, "merge") for one in given or [None]]
    read = [read_adapter(folder) for folder in folders]
    model = find_base(read[0], base)
    shards = read_weights(model)
    found = fingerprint(shards)
    for adapter in read:
        check_fits(adapter, model, shards, found)
    target = Path(output) if output else Path(f"{model.name}-merged")
    check_output(target, force, base=model)
    if dry_run:
        trained = _trained(read)
        report = {
            "output": str(target),
            "model": str(model),
            "adapters": [str(adapter.folder) for adapter in read],
            "dtype": dtype,
            "merged_tensors": len(trained),
            "shards": len(shards),
            "linked_shards": sum(not _rewritten(shard, trained, dtype) for shard in shards),
        }
    else:
        report = merge(read, model, shards, found, target, dtype=dtype, link=link, force=force)
    report["dry_run"] = dry_run
    if push_to_hub and dry_run:
        sizes = {shard.name: shard.size for shard in shards}
        others = {path.name: path.stat().st_size for path in model.iterdir() if path.is_file()}
        report["push"] = publish.preview(push_to_hub, others | sizes | dict.fromkeys(REPLACED))
    elif push_to_hub:
        report["push"] = publish.push(target, push_to_hub)
    if as_json:
        print(json.dumps(report, indent=2))
    elif not quiet:
        done = "would write" if dry_run else "wrote"
        print(
            f"liger: {done} {printable(target)}: {report['merged_tensors']} weights merged, "
            f"{report['linked_shards']} of {report['shards']} shards linked",
            file=sys.stderr,
        )
    return report


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's config and header. Raises ModelError where it is no plain LoRA."""
    if not os.path.lexists(folder / ADAPTER_CONFIG):
        raise UsageError(f"{folder} has no {ADAPTER_CONFIG}, so it is not an adapter; name what `liger finetune` wrote")
    config = read_json(inside(folder.resolve(), ADAPTER_CONFIG))
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {str(config.get('peft_type'))[:100]} adapter; only LoRA can be merged")
    for field, what in UNSUPPORTED.items():
        if config.get(field):
            raise ModelError(f"{folder} has {what} ({field}), which liger does not merge; use PEFT's merge_and_unload")
    start = config.get("init_lora_weights", True)
    if start is not None and start not in PLAIN_STARTS:
        raise ModelError(
            f"{folder} was begun by {str(start)[:100]!r} (init_lora_weights), which changes the base's weights; use "
            "PEFT's merge_and_unload"
        )
    if config.get("bias", "none") != "none":
        raise ModelError(f"{folder} has trained biases, which liger does not merge; use PEFT's merge_and_unload")
    if not os.path.lexists(folder / ADAPTER_WEIGHTS):
        raise ModelError(f"{folder} lacks {ADAPTER_WEIGHTS}; an adapter in any other format is never opened")
    tensors = _adapter_tensors(folder)
    replaced = {name for name in tensors if is_extra(name)}
    scales, ranks = {}, {}
    for module in sorted({name.rpartition(".lora_")[0] for name in tensors if name not in replaced}):
        pair = [tensors.get(f"{module}.lora_{side}.weight") for side in "AB"]
        if None in pair:
            raise ModelError(f"{folder}: {module} lacks one of its two LoRA matrices")
        a, b = (tensor.shape for tensor in pair)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise ModelError(f"{folder}: the LoRA matrices of {module} are {list(a)} and {list(b)}, which do not fit")
        name = f"{module.removeprefix(PREFIX)}.weight"
        scales[name], ranks[name] = _scale(folder, config, module, a[0]), a[0]
    whole = frozenset(name.removeprefix(PREFIX) for name in replaced)
    return Adapter(folder, read_manifest(folder), config, scales, bool(config.get("fan_in_fan_out")), ranks, whole)


def peft_config(adapter: Adapter):
    """The adapter as a `peft.LoraConfig`, made from what was read and checked, for PEFT to load its tensors into.

    The folder's own may name packages to import, files elsewhere, and patterns to search with.
    """
    from peft import LoraConfig

    modules = {name.removesuffix(".weight"): rank for name, rank in adapter.ranks.items()}
    alphas = {module: adapter.scales[f"{module}.weight"] * rank for module, rank in modules.items()}
    rank, alpha = next(iter(modules.values())), next(iter(alphas.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(modules),
        rank_pattern={f"^{re.escape(module)}": one for module, one in modules.items() if one != rank},
        alpha_pattern={f"^{re.escape(module)}": one for module, one in alphas.items() if one != alpha},
        fan_in_fan_out=adapter.transposed,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def find_base(adapter: Adapter, given: str | Path | None) -> Path:
    """The folder of the converted model, resolved.

    Raises:
        UsageError: it is neither given nor where the adapter says.
    """
    recorded = (adapter.manifest or {}).get("base", {}).get("path") or adapter.config.get("base_model_name_or_path")
    named = given or (recorded if isinstance(recorded, str) else "?")
    folder = Path(named)
    if given is not None:
        folder = folder.expanduser()
    elif not os.path.isdir(folder):
        folder = Path(adapter.folder.resolve().parent, folder.name)  # both were moved together
    if not os.path.isdir(folder):
        raise UsageError(f"the model {named} that {adapter.folder} was trained on is not there; name it with --base")
    if "liger" not in read_config(folder.resolve()):
        raise ModelError(f"{folder} is not linearized, so the adapter does not belong to it")
    return folder.resolve()


def merge(
    adapters: list[Adapter],
    model: Path,
    shards: tuple[Shard, ...],
    found: dict,
    target: Path,
    *,
    dtype: str | None = None,
    link: str = "auto",
    force: bool = False,
) -> dict:
    """Write the merged folder; parameters as for `run`, `found` is the fingerprint of `shards`."""
    trained = _trained(adapters)
    ways, linked = set(), 0
    family = read_converted(model).family
    with atomic_folder(target, force) as folder:
        for shard in shards:
            if _rewritten(shard, trained, dtype):
                with unchanged(shard.path):
                    write_shard(shard, folder / shard.name, adapters, dtype)
            else:
                ways.add(place(shard.path, folder / shard.name, link))
                linked += 1
        for path in sorted(model.rglob("*")):
            name = path.relative_to(model)
            weights = name.suffix == ".safetensors" or name.name == INDEX
            code = name.suffix in (".py", ".pyc", *PICKLES)
            if path.is_dir() or str(name) in REPLACED or weights or code or name.parts[0].startswith((".", "__")):
                continue
            real = inside(model, str(name))
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(real, folder / name)
        # Of this version's own, whatever Python lay in the model's folder.
        for name, text in model_files(family).items():
            (folder / name).write_text(text, encoding="utf-8")
        if len(shards) > 1 or (model / INDEX).is_file():
            _write_index(folder, shards)
        _write_config(model, folder, dtype, window_only(adapters))
        manifest = _manifest(adapters, model, found, dtype, sorted(ways))
        manifest |= {"code": code_hashes(family), "written": fingerprint(read_weights(folder))}
        (folder / "README.md").write_text(_card(adapters, model, target), encoding="utf-8")
        write_manifest(folder, manifest)
    return {
        "output": str(target),
        "model": str(model),
        "adapters": [str(adapter.folder) for adapter in adapters],
        "dtype": dtype,
        "merged_tensors": len(trained),
        "shards": len(shards),
        "linked_shards": linked,
        "link": "+".join(sorted(ways)) or None,
    }


def _trained(adapters: list[Adapter]) -> set[str]:
    """Names of the tensors that change. Raises UsageError where two adapters hold all of one."""
    trained = {name for adapter in adapters for name in adapter.trained}
    for name in trained:
        owners = [str(adapter.folder) for adapter in adapters if name in adapter.replaced]
        if len(owners) > 1:
            raise UsageError(f"{owners[0]} and {owners[1]} both hold all of {name}, which cannot be added; merge one")
    return trained


def _rewritten(shard: Shard, trained: set[str], dtype: str | None) -> bool:
    """Whether a shard holds something trained, or is of another dtype than asked for; else it is linked."""
    # Extra tensors stay float32: they are few, and the model loads them so.
    converts = dtype is not None and shard.name != EXTRAS
    converts = converts and any(tensor.dtype != DTYPES[dtype] for tensor in shard.tensors.values())
    return converts or bool(trained & set(shard.tensors))


def write_shard(shard: Shard, target: Path, adapters: list[Adapter], dtype: str | None = None) -> None:
    """Write one shard with the adapters merged in; at most one tensor is in memory.

    Args:
        dtype: convert every floating tensor; None keeps each tensor's own.
    """
    layout = json.loads(shard.header)
    metadata = layout.pop("__metadata__", None)
    start = 8 + len(shard.header)
    names = sorted(layout, key=lambda name: layout[name]["data_offsets"])
    header, position = ({"__metadata__": metadata} if metadata else {}), 0
    for name in names:
        tensor = shard.tensors[name]
        kind = DTYPES[dtype] if dtype and tensor.dtype in DTYPES.values() else tensor.dtype
        size = tensor.nbytes if kind == tensor.dtype else tensor.numel * (4 if kind == "F32" else 2)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(shard.path, "rb") as reader, open(target, "xb") as writer:
        writer.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            first, last = layout[name]["data_offsets"]
            touched = [adapter for adapter in adapters if name in adapter.trained]
            reader.seek(start + first)
            if touched or header[name]["dtype"] != shard.tensors[name].dtype:
                _write_merged(shard, name, touched, header[name]["dtype"], reader, writer)
            else:
                _copy(reader, writer, last - first)


def _write_merged(shard: Shard, name: str, adapters: list[Adapter], kind: str, reader, writer) -> None:
    """Read from the file, not through a memory map: a shard that others shorten would end the process by a signal."""
    import torch

    tensor = shard.tensors[name]
    content = bytearray(reader.read(tensor.nbytes))
    if len(content) < tensor.nbytes:
        raise _ended_early(reader)
    names = {value: key for key, value in DTYPES.items()}
    merged = torch.frombuffer(content, dtype=getattr(torch, names[tensor.dtype])).view(tensor.shape).float()
    for adapter in adapters:
        merged = whole_tensor(adapter, name) if name in adapter.replaced else merged + delta(adapter, name)
    if not torch.isfinite(merged).all():
        raise ModelError(f"{name} is not finite once merged; the adapter is broken")
    merged = merged.to(getattr(torch, names[kind])).contiguous()
    writer.write(merged.flatten().view(torch.uint8).numpy().data)


def delta(adapter: Adapter, name: str):
    """What an adapter adds to the weight `name`: scale * B A, a float32 tensor [out, in]."""
    from safetensors import safe_open

    module = PREFIX + name.removesuffix(".weight")
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, framework="pt") as file:
        a = file.get_tensor(f"{module}.lora_A.weight").float()
        b = file.get_tensor(f"{module}.lora_B.weight").float()
    update = (b @ a) * adapter.scales[name]
    return update.T if adapter.transposed else update


def whole_tensor(adapter: Adapter, name: str):
    """The extra tensor `name` as the adapter trained it, in float32."""
    from safetensors import safe_open

    with safe_open(adapter.folder / ADAPTER_WEIGHTS, framework="pt") as file:
        return file.get_tensor(PREFIX + name).float()


def check_fits(adapter: Adapter, model: Path, shards: tuple[Shard, ...], found: dict) -> None:
    """Raises ModelError where the adapter was trained on other weights, or names tensors that are not there."""
    wanted = (adapter.manifest or {}).get("fingerprint", {}).get("digest")
    if wanted is None:
        print(f"liger: {adapter.folder} records no fingerprint; only the shapes are checked", file=sys.stderr)
    elif wanted != found["digest"]:
        raise ModelError(f"{adapter.folder} was trained on other weights than those of {model}; name its own --base")
    check_shapes(adapter, model, shards)


def check_shapes(adapter: Adapter, model: Path, shards: tuple[Shard, ...]) -> None:
    """Raises ModelError where the adapter names tensors that are not there, or of another shape."""
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    shapes = {
        name: tensor.shape for shard_ in _adapter_shards(adapter.folder) for name, tensor in shard_.tensors.items()
    }
    for name in adapter.replaced:
        shape = shapes[PREFIX + name]
        if name not in tensors or tensors[name].shape != shape:
            raise ModelError(f"{adapter.folder} trains {name} {list(shape)}, which {model} does not have")
    for name in adapter.scales:
        module = PREFIX + name.removesuffix(".weight")
        if name not in tensors:
            raise ModelError(f"{adapter.folder} trains {name}, which {model} does not have")
        rows, columns = shapes[f"{module}.lora_B.weight"][0], shapes[f"{module}.lora_A.weight"][1]
        shape = (columns, rows) if adapter.transposed else (rows, columns)
        if tensors[name].shape != shape:
            raise ModelError(f"{adapter.folder}: the update of {name} is {shape}, the weight {tensors[name].shape}")


def _adapter_shards(folder: Path) -> tuple[Shard, ...]:
    from liger_cli.checkpoint import read_shard

    return (read_shard(folder.resolve(), ADAPTER_WEIGHTS),)


def _adapter_tensors(folder: Path) -> dict[str, Tensor]:
    names = {name: tensor for shard in _adapter_shards(folder) for name, tensor in shard.tensors.items()}
    for name in names:
        lora = name.endswith((".lora_A.weight", ".lora_B.weight"))
        if not name.startswith(PREFIX) or not (lora or is_extra(name)):
            raise ModelError(f"{folder} holds {name}, which is not LoRA of a linear layer; use PEFT's merge_and_unload")
    if not names:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} is empty")
    return names


def is_extra(name: str) -> bool:
    """Whether a tensor is one that liger added to the model, trained as a whole and not by LoRA."""
    return name.rpartition(".")[2] in NAMES


def _scale(folder: Path, config: dict, module: str, rank: int) -> float:
    """alpha / r of one module, with PEFT's patterns for single modules. Raises ModelError."""
    named = _pattern(folder, config, "rank_pattern", module, config.get("r"))
    if named != rank:
        raise ModelError(f"{folder}: {module} has rank {rank}, where {ADAPTER_CONFIG} says {named!r:.100}")
    alpha = _pattern(folder, config, "alpha_pattern", module, config.get("lora_alpha"))
    if type(alpha) not in (int, float) or not abs(alpha) <= MAX_ALPHA:
        raise ModelError(f"{folder}: lora_alpha of {module} is {alpha!r:.100}, but has to be a number")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _pattern(folder: Path, config: dict, field: str, module: str, default):
    from peft.utils.other import get_pattern_key

    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise ModelError(f"{folder}: {field} is {patterns!r:.100}, but has to be an object")
    for pattern in patterns:
        # Two repetitions can make a search take for ever; PEFT itself writes names.
        if len(pattern) > 500 or sum(pattern.count(one) for one in "*+{") > 1:
            raise ModelError(
                f"{folder}: {field} has the pattern {pattern[:100]!r}, which is more than liger searches with"
            )
    try:
        return patterns.get(get_pattern_key(patterns.keys(), module.removeprefix(PREFIX)), default)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{folder}: {field} has a pattern that is none ({error})") from None


def _copy(reader, writer, count: int) -> None:
    while count:
        block = reader.read(min(count, COPIED))
        if not block:
            raise _ended_early(reader)
        writer.write(block)
        count -= len(block)


def _ended_early(reader) -> LigerError:
    return LigerError(f"{reader.name} was changed while it was read; run the command again")


def _write_index(folder: Path, shards: tuple[Shard, ...]) -> None:
    written = read_headers(folder, shards)
    total = sum(tensor.nbytes for shard in written for tensor in shard.tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_headers(folder: Path, shards: tuple[Shard, ...]) -> list[Shard]:
    """The written shards, read again: each has to be whole."""
    from liger_cli.checkpoint import read_shard

    return [read_shard(folder.resolve(), shard.name) for shard in shards]


def window_only(adapters: list[Adapter]) -> bool:
    """Whether the adapters were trained with the window alone. Raises UsageError where only some of them were."""
    ways = {str(_recipe(adapter).get("attention", "liger")) for adapter in adapters}
    if len(ways) > 1:
        raise UsageError("some of these adapters were trained with the window alone and some were not; merge one kind")
    return ways == {"window"}


def _recipe(adapter: Adapter) -> dict:
    return ((adapter.manifest or {}).get("settings") or {}).get("recipe") or {}


def _write_config(model: Path, folder: Path, dtype: str | None, no_recurrence: bool) -> None:
    config = read_config(model)
    if no_recurrence:
        for layer in config["liger"]["layers"]:
            if layer["kind"] == "liger":
                layer["mix"] = 0.0
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _manifest(adapters: list[Adapter], model: Path, found: dict, dtype: str | None, ways: list[str]) -> dict:
    """`base` is the original checkpoint that the model was converted from, so that it can be compared with."""
    converted = read_manifest(model) or {}
    original = converted.get("base") or {}
    return new_manifest(
        "merged",
        base={**original, "fingerprint": original.get("fingerprint") or converted.get("fingerprint")},
        model={"path": str(model), "fingerprint": found},
        adapters=[
            {
                "path": str(adapter.folder.resolve()),
                "settings": (adapter.manifest or {}).get("settings"),
                "sha256": _sha256(adapter.folder / ADAPTER_WEIGHTS),
            }
            for adapter in adapters
        ],
        settings={"dtype": dtype, "link": "+".join(ways) or None, **_layers(converted)},
    )


def _layers(converted: dict) -> dict:
    layers = (converted.get("settings") or {}).get("layers")
    return {"layers": layers} if layers else {}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _card(adapters: list[Adapter], model: Path, target: Path) -> str:
    """The converted model's card with a section on the merge."""
    card = model / "README.md"
    if os.path.lexists(card):
        text = read_bytes(inside(model, card.name)).decode("utf-8", "replace")
    else:
        text = f"# {markdown(target.name)}\n"
    lines = []
    for adapter in adapters:
        settings = (adapter.manifest or {}).get("settings") or {}
        recipe, data = _recipe(adapter).get("name", "unknown"), settings.get("data", "unknown")
        lines.append(f"- {code_span(adapter.folder.name)}: recipe {code_span(recipe)}, data {code_span(data)}")
    return (
        f"{text.rstrip()}\n\n## Fine-tuned\n\nThese LoRA adapters are merged into the weights:\n\n"
        + "\n".join(lines)
        + "\n"
    )
