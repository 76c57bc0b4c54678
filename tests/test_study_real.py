"""The study on a real base: rows that go on where they were stopped, windows of equal bytes, the table."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from liger_cli.checkpoint.reader import read_checkpoint
from liger_cli.conversion.plan import make_plan
from liger_cli.conversion.plan_edits import constant_bytes
from liger_cli.shipped import BASE_DIR, prose
from liger_cli.system.errors import UsageError
from liger_cli.training.recipes import load_recipe
from study import real
from study.real import ROWS, best_rates, compared, parse_limits, planned, results, table
from study.rows import RATES, parse_tokens, show_tokens

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "study" / "results" / "smollm2-135m"


@pytest.fixture
def base(tmp_path):
    """A random model of two layers with the shipped base's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path / "tiny"
    shutil.copytree(BASE_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(BASE_DIR)
    for name, value in (("hidden_size", 32), ("intermediate_size", 32), ("num_hidden_layers", 2), ("head_dim", 16)):
        setattr(config, name, value)
    config.layer_types = config.layer_types[:2]
    config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings = 2, 1, 4096
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_every_row_has_a_name_of_its_own():
    names = [name for name, *_ in planned(100_000, 500_000)]
    assert len(names) == len(set(names))
    assert names[:3] == ["base", "plain", "calibrated"] and {"paper-0.1M", "best-0.1M", "best-0.5M"} <= set(names)
    assert not any(budget for name, row, budget in planned(1000, None) if row.recipe is None)


def test_the_guide_names_the_rows_commands():
    text = (Path(__file__).parents[1] / "liger_cli" / "guides" / "reproducing.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [name for name, *_ in told] == [f"`{row.name}`" for row in ROWS]
    for row, (name, convert, training) in zip(ROWS, told, strict=True):
        assert tuple(shlex.split(convert.strip("`"))) == row.convert, name
        recipe, _, changed = training.partition(" with ")
        assert recipe.strip("`") == (row.recipe or ""), name
        assert re.findall(r"`(\w+): (\w+)`", changed) == list(row.changes.items()), name


def test_the_guide_and_the_readme_show_the_results():
    """The table of the rows that are kept, and of some of them in the README."""
    found = results(RESULTS)
    assert len(found) >= 6 and not any("failed" in result for result in found)
    guide = (ROOT / "liger_cli" / "guides" / "reproducing.md").read_text(encoding="utf-8")
    shown = guide.partition("<!-- smollm2-135m: begin -->\n")[2].partition("<!-- smollm2-135m: end -->")[0]
    assert shown == table(found) == (RESULTS / "table.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| .*\(`([\w.-]+)`\) \| (.*) \|$", readme, re.MULTILINE)
    rows = {result["name"]: result for result in found}
    assert len(lines) >= 5
    for name, cells in lines:
        result = rows[name]
        (text,) = result["texts"].values()
        kl, needles = text["kl_by_position"], text["needle"]
        assert cells.split(" | ") == [
            f"{result['bytes']['32768'] / 2**20:.1f} MiB",
            f"{sum(result['tokens'].values()):,}",
            f"{text['perplexity']:,.2f}",
            f"{kl['257-1024']:.3f}",
            f"{kl['1025-2048']:.3f}",
            f"{needles['512']['exact']:.0%} / {needles['1900']['exact']:.0%}",
            f"{text['second_reading']:.2f}",
        ], name


@pytest.mark.parametrize(("text", "tokens"), [("0.1M", 100_000), ("100k", 100_000), ("4096", 4096), ("2M", 2_000_000)])
def test_tokens(text, tokens):
    assert parse_tokens(text) == tokens == parse_tokens(show_tokens(tokens))
    with pytest.raises(UsageError, match="is no number of tokens"):
        parse_tokens(f"{text}x")


def test_the_comparison_is_fair(base):
    """As many sinks as ours, other rates than the published ones, windows of the methods' bytes."""
    rows = {name: row for name, row, _ in planned(100_000, None, compared(base))}
    assert rows["lolcats-sinks4-0.1M"].convert == ("--recipe", "lolcats", "--sinks", "4")
    assert rows["paper-sinks4-0.1M"].recipe == "paper" and "supra-sinks4-0.1M" not in rows
    for name in ("paper", "lolcats", "supra"):
        published, other = rows[f"{name}-0.1M"], rows[f"{name}-lr3x-0.1M"]
        assert other.convert == published.convert and other.recipe == published.recipe and other.changes["stages"]
        rates = [stage["lr"] for stage in other.changes["stages"]]
        assert rates == pytest.approx([3 * stage.lr for stage in load_recipe(published.recipe).stages])
        assert all(f"{name}-lr{factor:g}x-0.1M" in rows for factor in RATES)
    checkpoint = read_checkpoint(base)
    models = {"gla": {"sinks": 4}, "lolcats": load_recipe("lolcats").model | {"sinks": 4}}
    for name, model in (models | {"supra": load_recipe("supra").model}).items():
        window = int(rows[f"window-only-as-{name}"].convert[3])
        sizes = [
            constant_bytes(make_plan(checkpoint, {"window": window + more, "mix": 0.0, "sinks": 4})) for more in (0, 1)
        ]
        assert sizes[0] <= constant_bytes(make_plan(checkpoint, model)) < sizes[1] or window == 1, name
        assert rows[f"window-only-as-{name}"].convert[-2:] == ("--sinks", "4")
        assert rows[f"window-only-as-{name}-trained-0.1M"].changes["attention"] == "window"
        nbytes = constant_bytes(make_plan(checkpoint, model))
        assert rows[f"calibrated-as-{name}"].convert == ("--calibrate", "--budget", f"{nbytes}@32K")
        assert rows[f"best-as-{name}-0.1M"].convert == rows[f"calibrated-as-{name}"].convert
    tried = [
        {"name": f"{row}-0.1M", "row": row, "budget": 100_000, "training": {"held_out_perplexity": held_out}}
        for row, held_out in (("lolcats", 9.0), ("lolcats-lr3x", 8.0), ("lolcats-lr10x", 8.5), ("supra", 7.0))
    ]
    assert [result["name"] for result in best_rates(tried)] == ["lolcats, best rate: lolcats-lr3x-0.1M"]


def test_rows_are_computed_once(base, tmp_path, capsys):
    """An untrained row, a window of its bytes, a trained one; again, nothing is computed; a failure is a row, too."""
    (tmp_path / "text.txt").write_text(prose()[1][:30_000])
    options = [str(base), "--output", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"), "--tasks", ""]
    options += ["--data", str(tmp_path / "text.txt"), "--rows", "1", "--needles", "1", "--budget", "8k"]
    options += ["--calibration-data", str(tmp_path / "text.txt"), "--longer", "none"]
    assert real.main([*options, "--only", "base,window,calibrated,best-8k"]) == 0
    said = capsys.readouterr()
    assert [line.split(": ")[0] for line in said.err.splitlines() if line.startswith(("done", "failed"))] == [
        "done"
    ] * 4
    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "out" / "rows.jsonl").read_text().splitlines())}
    assert list(rows) == ["base", "calibrated", "window", "best-8k"]
    assert rows["base"]["texts"]["text.txt"]["kl"] == 0 and rows["window"]["texts"]["text.txt"]["kl"] > 0
    assert list(rows["base"]["texts"]["text.txt"]["kl_by_position"])[-1] == "1025-2048"
    # Equal bytes, but for the state, which counts as window.
    assert rows["window"]["bytes"]["8192"] == pytest.approx(rows["calibrated"]["bytes"]["8192"], rel=0.02)
    assert rows["base"]["bytes"]["32768"] == 4 * rows["base"]["bytes"]["8192"]
    assert rows["best-8k"]["tokens"]["training"] > 4000 and rows["best-8k"]["tokens"]["calibration"] > 0
    assert str(tmp_path) not in (tmp_path / "out" / "rows.jsonl").read_text()  # results can be handed on
    assert re.fullmatch("text.txt@[0-9a-f]{16}", rows["base"]["question"]["data"])
    written = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {name} |" in written for name in rows)
    assert real.main([*options, "--only", "base,calibrated"]) == 0
    assert "kept: base" in capsys.readouterr().err
    (tmp_path / "few.txt").write_text("Too little.")
    options[options.index("--text") + 1] = str(tmp_path / "few.txt")
    assert real.main([*options, "--only", "base"]) == 0
    assert "failed (liger: " in capsys.readouterr().err
    assert "failed: base" in (tmp_path / "out" / "table.md").read_text()


def test_windows_need_the_calibrated_row(base, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(prose()[1][:30_000])
    options = [str(base), "--output", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"), "--only", "window"]
    assert real.main(options) == 2
    assert "need the row 'calibrated'" in capsys.readouterr().err


def test_limits():
    assert parse_limits("200,mmlu_local:5") == (200, {"mmlu_local": 5})
    with pytest.raises(UsageError, match="--limits is '5:mmlu'"):
        parse_limits("5:mmlu")


def test_tasks_have_their_errors():
    text = {
        "perplexity": 3.0,
        "kl_by_position": {"1-64": 0.5},
        "needle": {"128": {"exact": 0.5}},
        "second_reading": 1.0,
    }
    tasks = {
        "figures": {"piqa": {"acc": {"value": 0.5, "stderr": 0.01}, "acc_norm": {"value": 0.625, "stderr": 0.034}}},
        "details": {"piqa": {"examples": 200}},
    }
    result = {
        "name": "best-0.1M", "row": "best", "budget": 100_000, "texts": {"a.txt": text}, "tasks": tasks,
        "tokens": {"calibration": 20_480, "training": 98_304}, "seconds": {"convert": 60.2, "training": 40.0},
        "bytes": {"2048": 2**20, "8192": 2**20, "32768": 2**21},
    }  # fmt: skip
    lines = table([result]).splitlines()
    assert "| best-0.1M | 3.00 | 0.5000 | 50% | 1.000 | 1.0 | 1.0 | 2.0 | 118,784 | 100 |" in lines
    assert "| best-0.1M | 62.5 ± 3.4 |" in lines and "| examples | 200 |" in lines
