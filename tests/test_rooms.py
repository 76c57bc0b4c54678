"""The rooms: imports go downward only, wherever in a file they stand, and no module reaches itself again."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "liger_cli"
FLOORS = (
    ("templates",),
    ("system",),
    ("checkpoint",),
    ("conversion", "shipped"),
    ("evaluation",),
    ("calibration",),
    ("training", "benchmark"),
    ("commands",),
    ("main",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(module: str, source: str, known: set[str]) -> set[str]:
    """Modules of liger that a module imports, at its top or in its functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.startswith("liger_cli.")}


def arrows(root: Path) -> dict[str, set[str]]:
    """Module -> modules that it imports; `liger_cli.templates` counts as one."""
    paths = {
        ".".join(("liger_cli", *path.relative_to(root).with_suffix("").parts)): path for path in root.rglob("*.py")
    }
    known = {name.removesuffix(".__init__") for name in paths}
    return {
        name.removesuffix(".__init__"): imported(name, path.read_text(encoding="utf-8"), known)
        for name, path in paths.items()
    }


def room_of(module: str) -> str:
    return module.split(".")[1]


def upward(found: dict[str, set[str]]) -> list[str]:
    """Arrows into a higher room, or into another room of the same floor."""
    return [
        f"{module} -> {other}"
        for module, others in found.items()
        for other in sorted(others)
        if module != "liger_cli"
        and room_of(module) != room_of(other)
        and FLOOR[room_of(other)] >= FLOOR[room_of(module)]
    ]


def circle(found: dict[str, set[str]]) -> list[str]:
    """Modules of one circle, or none."""
    done, path = set(), []

    def visit(module: str) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        path.append(module)
        for other in sorted(found.get(module, ())):
            if met := visit(other):
                return met
        done.add(path.pop())
        return []

    return next((met for module in sorted(found) if (met := visit(module))), [])


def test_every_module_is_in_a_room():
    found = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert found - {"__init__"} == set(FLOOR) - {"templates"}


def test_imports_go_downward():
    assert upward(arrows(ROOT)) == []


def test_no_circle():
    assert circle(arrows(ROOT)) == []


@pytest.mark.parametrize(
    ("found", "up", "round_trip"),
    [
        ({"liger_cli.system.a": {"liger_cli.checkpoint.b"}}, 1, False),
        ({"liger_cli.training.a": {"liger_cli.benchmark.b"}}, 1, False),
        ({"liger_cli.system.a": {"liger_cli.system.b"}, "liger_cli.system.b": {"liger_cli.system.a"}}, 0, True),
        ({"liger_cli.main": {"liger_cli.commands.a"}, "liger_cli.commands.a": {"liger_cli.system.b"}}, 0, False),
    ],
)
def test_the_rule_itself(found, up, round_trip):
    assert len(upward(found)) == up
    assert bool(circle(found)) == round_trip
