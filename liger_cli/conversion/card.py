"""The model card (README.md) of a converted folder."""

import re
from contextlib import suppress
from importlib.resources import files

from liger_cli.checkpoint.hub import Source
from liger_cli.checkpoint.reader import Checkpoint, inside
from liger_cli.conversion.plan import Plan
from liger_cli.system.errors import ModelError
from liger_cli.system.escape import code_span, markdown, yaml_string
from liger_cli.system.wording import by_layer, size

UNTRAINED = "**Converting changes no weight, and until it is fine-tuned a converted model is worse than its base.**"
FRONT_BYTES = 64 << 10  # of a model card, looked through for its licence


def model_card(source: Source, plan: Plan, manifest: dict) -> str:
    """README.md of the converted folder. Names come from strangers: the sandbox and the filters keep them text."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["yaml"] = yaml_string
    environment.filters["code"] = code_span
    environment.filters["markdown"] = markdown
    environment.filters["size"] = size
    template = files("liger_cli.templates").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    kinds = [spec.kind for spec in plan.specs]
    return environment.from_string(template).render(
        untrained=UNTRAINED,
        name=source.name,
        revision=source.revision,
        spec=next(spec for spec in plan.specs if spec.kind == "liger"),
        windows=_by_layer(plan, "window"),
        kept=_by_layer(plan, "kept"),
        scaled=any(spec.branch_scales for spec in plan.specs),
        added=plan.added_parameters(),
        calibration=_shown_calibration(manifest.get("calibration")),
        counts={kind: kinds.count(kind) for kind in ("liger", "softmax", "base")},
        softmax_heads=[f"{index}:{head}" for index, spec in enumerate(plan.specs) for head in spec.softmax_kv_heads],
        licence=base_licence(plan.checkpoint),
        memory=plan.memory(),
        notes=plan.notes,
        versions=manifest["versions"],
        model=f"Liger{plan.checkpoint.family.prefix}ForCausalLM",
    )


def _by_layer(plan: Plan, setting: str) -> str:
    """A setting of the Liger layers in words: one number, or each with its layers."""
    values = {index: getattr(spec, setting) for index, spec in enumerate(plan.specs) if spec.kind == "liger"}
    return by_layer(values) if len(set(values.values())) > 1 else str(next(iter(values.values())))


def _shown_calibration(report: dict | None) -> dict | None:
    """What the card says of a calibration: texts, tokens, and KL by position of the model and of both controls."""
    if report is None:
        return None
    names = {
        "window_only": "the windows and sinks alone",
        "same_bytes": f"windows of {report['same_bytes_window']} tokens, which take the same bytes",
        "model": "this model as converted",
    }
    found = report["kl_by_position"]
    return {
        "text": report["text"],
        "tokens": f"{report['tokens']:,}",
        "seq_len": f"{report['seq_len']:,}",
        "held_out": report["held_out"],
        "held_out_tokens": f"{report['held_out_tokens']:,}",
        "positions": list(found["model"]),
        "rows": [(title, [f"{value:.4f}" for value in found[name].values()]) for name, title in names.items()],
    }


def base_licence(checkpoint: Checkpoint) -> dict[str, str]:
    """The licence fields of the base's model card; `{"license": "other"}` where it has none."""
    found = {}
    with suppress(ModelError):
        with open(inside(checkpoint.folder, "README.md"), "rb") as file:
            text = file.read(FRONT_BYTES).decode("utf-8", "replace")
        front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        for line in front[1].splitlines() if front else ():
            if match := re.fullmatch(r"(license|license_name|license_link):\s*['\"]?([^'\"\s#]+)['\"]?\s*", line):
                found[match[1]] = match[2]
    return {"license": "other"} | found
