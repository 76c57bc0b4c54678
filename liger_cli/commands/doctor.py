"""`liger doctor`: what is installed, what it runs on, and whether this environment can run liger at all."""

import json
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from liger_cli import __version__
from liger_cli.benchmark.roofline import processor_name
from liger_cli.evaluation.subject import pick_device
from liger_cli.system.console import say
from liger_cli.system.errors import SetupError, UsageError
from liger_cli.system.manifest import pip_install
from liger_cli.system.memory import available
from liger_cli.system.tables import Table, print_tables
from liger_cli.system.wording import counted, size

OPTIONAL = {
    "flash-linear-attention": "the recurrences on CUDA; " + pip_install("cuda"),
    "flash-attn": "the window on CUDA in half precision; " + pip_install("cuda"),
    "bitsandbytes": "4-bit bases on CUDA",
    "lm-eval": "liger eval --tasks; " + pip_install("eval"),
    "tensorboard": "liger finetune --report-to tensorboard",
    "wandb": "liger finetune --report-to wandb",
}


def examine() -> dict:
    """Versions, devices, what each gate runs on, and `problems`: why liger could not run, empty where it can."""
    packages, problems = required_packages()
    report = {
        "liger": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "optional": {name: {"version": installed(name), "for": use} for name, use in OPTIONAL.items()},
        "devices": [],
        "gates": {},
        "problems": problems,
    }
    if not packages.get("torch", {}).get("version"):
        return report
    try:
        import torch

        report["devices"] = devices(torch)
        report["torch_cuda"] = torch.version.cuda
        _smoke_test(torch)
    except Exception as error:  # whatever a broken installation raises is what has to be reported
        problems.append(f"torch does not work: {type(error).__name__}: {error}")
        return report
    from liger_cli.benchmark.backends import device_backends

    chosen = device_backends(any(row["device"].startswith("cuda") for row in report["devices"]))
    obstacle = chosen.pop("obstacle")
    report |= {"backend": chosen.pop("requested"), **chosen}
    if obstacle:
        problems.append(obstacle)
    return report


def required_packages() -> tuple[dict, list[str]]:
    """Every required package with its installed version, and a sentence for each that is missing or out of range."""
    from packaging.requirements import Requirement

    packages, problems = {}, []
    for line in requires("liger-cli") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = installed(requirement.name)
        packages[requirement.name] = {"version": found, "wanted": str(requirement.specifier)}
        if found is None:
            problems.append(f"{requirement.name} is missing; pip install '{requirement}'")
        elif not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} is {found}, but has to be {requirement.specifier}")
    return packages, problems


def installed(name: str) -> str | None:
    """The installed version of a distribution, or None; nothing is imported."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices(torch) -> list[dict]:
    """The CPU and every CUDA device, with memory in bytes."""
    found = [{"device": "cpu", "name": processor_name(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({"device": f"cuda:{index}", "name": properties.name, "memory_bytes": properties.total_memory})
    return found


def _smoke_test(torch) -> None:
    """One chunked recurrence against its definition, on the CPU."""
    from liger_cli.templates.liger_recurrence import chunk_decay, naive_decay

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 8, generator=generator) for _ in range(3))
    log_decay = -torch.rand(1, 2, 70, 8, generator=generator)
    difference = (chunk_decay(q, k, v, log_decay)[0] - naive_decay(q, k, v, log_decay)[0]).abs().max().item()
    if not difference < 1e-3:
        raise ArithmeticError(f"the chunked recurrence is off by {difference} from its definition")


def memory(folder: str) -> dict:
    """`{"model", "device", "free_bytes", "commands"}`: which commands fit beside what is free on the device that they
    take by themselves. Raises as `needs.command_needs`; UsageError where there is no such folder."""
    from liger_cli.commands.needs import command_needs
    from liger_cli.training.plan import MEMORY_SHARE

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UsageError(f"{folder} is not a folder; name a base or a model that liger made")
    device = pick_device("auto")
    free = available(device)
    rows = command_needs(path, device)
    fitting = [{**row, "fits": None if free is None else row["bytes"] <= MEMORY_SHARE * free} for row in rows]
    return {"model": folder, "device": device, "free_bytes": free, "commands": fitting}


def run(as_json: bool, model: str | None = None) -> None:
    """Print the report. Raises SetupError (exit 4) where the environment cannot run liger."""
    report = examine()
    if model and not report["problems"]:
        report["memory"] = memory(model)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    if report["problems"]:
        raise SetupError("; ".join(report["problems"]))
    if not as_json:
        say("next: liger demo, or liger convert BASE")


def _print(report: dict) -> None:
    packages = Table("", ["package", "installed", "wanted or used for"], words=3)
    packages.rows += [[name, row["version"] or "missing", row["wanted"]] for name, row in report["packages"].items()]
    packages.rows += [[name, row["version"] or "-", row["for"]] for name, row in report["optional"].items()]
    print(f"liger {report['liger']}, Python {report['python']}, {report['platform']}")
    notes = []
    for device in report["devices"]:
        memory = f", {size(device['memory_bytes'], 0)}" if "memory_bytes" in device else ""
        threads = f", {counted(device['threads'], 'thread')}" if "threads" in device else ""
        notes.append(f"{device['device']}: {device['name']}{memory}{threads}")
    print_tables([packages], notes=tuple(notes))
    if report["gates"]:
        backends = Table("", ["gate", "runs on", "why"], words=3)
        for name, row in {**report["gates"], "window": report["window"]}.items():
            backends.rows.append([name, row["backend"], row["why"]])
        asked = f"backend asked for: {report['backend']} (LIGER_BACKEND, or `backend` in a model's config.json)"
        print_tables([backends], notes=(asked,))
    if "memory" in report:
        found = report["memory"]
        words = {True: "yes", False: "no", None: "unknown"}
        needs = Table("", ["command", "takes about", "fits"])
        needs.rows = [[row["command"], size(row["bytes"]), words[row["fits"]]] for row in found["commands"]]
        free = "" if found["free_bytes"] is None else f", {size(found['free_bytes'])} free"
        where = f"{found['model']} on {found['device']}{free}"
        print_tables([needs], notes=(f"{where}; counted from the weights' shapes, on the safe side",))
