"""An option stands once: what the command line, the help and the Python functions make of the same dataclass."""

import inspect
from dataclasses import fields

import pytest
from typer.testing import CliRunner

import liger_cli
from liger_cli.commands.convert_options import ConvertOptions
from liger_cli.commands.finetune_options import FinetuneOptions
from liger_cli.conversion.plan import with_defaults
from liger_cli.main import app
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_gates import GATES
from liger_cli.training.recipes import load_recipe


def test_help_names_what_the_recipes_have():
    """`(best ..., paper ...)` beside an option of finetune is what those recipes hold."""
    checked = 0
    for one in fields(FinetuneOptions):
        if not (one.metadata.get("recipe") and one.metadata["shown"].startswith("best ")):
            continue
        words = one.metadata["shown"].removeprefix("best ").split(", paper ")
        for name, shown in zip(("best", "paper"), words, strict=True):
            recipe = load_recipe(name)
            if not hasattr(recipe, one.name):
                values = [getattr(stage, one.name) for stage in recipe.stages]
                assert shown == " then ".join(f"{told:g}" if isinstance(told, float) else told for told in values)
                checked += 1
                continue
            value = getattr(recipe, one.name)
            told = {True: "yes", False: "no"}[value] if isinstance(value, bool) else "none" if value is None else value
            told = ",".join(told) if isinstance(told, tuple) else f"{told:g}" if isinstance(told, float) else str(told)
            assert shown == told, f"{one.name} of {name}"
            checked += 1
    assert checked > 20


def test_every_setting_of_a_layer_is_an_option_of_convert():
    """But for what others set: the kind of a layer, its softmax heads, and what runs the kernels."""
    offered = {one.name for one in fields(ConvertOptions)}
    assert {one.name for one in fields(LayerSpec)} - offered == {"kind", "softmax_kv_heads", "backend"}


def test_only_what_was_given_is_a_setting():
    assert ConvertOptions(base="b").settings() == {"layers": []}
    asked = ConvertOptions(base="b", mix=0, sinks=0, gate_init="random", layer=["0:gate=gdn"])
    assert asked.settings() == {
        "mix": 0, "sinks": 0, "gate_init": "random", "gate_params": "learned", "layers": ["0:gate=gdn"]
    }  # fmt: skip


def test_changes_of_a_recipe_keep_what_is_off():
    asked = FinetuneOptions(packing=False, held_out=0, target_modules="q_proj,k_proj", data="d")
    assert asked.changes() == {"packing": False, "held_out": 0, "target_modules": ("q_proj", "k_proj")}


@pytest.mark.parametrize("name", ["convert", "finetune", "merge", "evaluate", "bench"])
def test_command_and_function_have_the_same_parameters(name):
    function = getattr(liger_cli, name)
    for parameter in inspect.signature(function).parameters.values():
        assert f"{parameter.name}:" in function.__doc__
    (command,) = [one for one in app.registered_commands if one.name == {"evaluate": "eval"}.get(name, name)]
    shared = set(inspect.signature(command.callback).parameters) - {"as_json"}
    assert shared == set(inspect.signature(function).parameters)


def test_functions_print_nothing_and_return_the_report(sparse_base, tmp_path, capsys):
    report = liger_cli.convert(str(sparse_base()), str(tmp_path / "out"), gate="gdn", dry_run=True)
    assert report["dry_run"] and report["layers"][0]["gate"] == "gdn"
    assert capsys.readouterr().out == ""
    with pytest.raises(TypeError, match="gaet"):
        liger_cli.convert("base", gaet="gdn")


SHOWN = [("convert", "--calibrate", "--slots"), ("finetune", "--data", "--report-to"), ("eval", "--data", "--save")]


@pytest.mark.parametrize(("name", "first", "last"), SHOWN)
def test_the_most_needed_stands_first_and_no_name_is_cut(name, first, last):
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80", "TERM": "dumb"}).output
    assert shown.index("Options") < shown.index(first) < shown.index(last)
    assert "…" not in shown
    panels = [line for line in shown.splitlines() if line.startswith("╭─")]
    assert len(panels) >= 4 and "Options" in panels[1]


@pytest.mark.parametrize("gate", sorted(GATES))
def test_a_calibration_gives_every_gate_of_one_decay_a_state(gate):
    """Of what is neither in the window nor kept; the others keep a recurrence over all tokens, with coefficients."""
    spec = LayerSpec(**with_defaults({"gate": gate}, calibrate=True))
    assert (spec.rest, spec.branch_scales) == (GATES[gate].one_decay, not GATES[gate].one_decay)
