"""Tables, the results file, the model card's section, comparisons."""

import csv
import io
import json
from types import SimpleNamespace

import pytest

from liger_cli.commands import evaluate
from liger_cli.evaluation.plots import position_plot
from liger_cli.evaluation.published import BASES, published_figures
from liger_cli.evaluation.report import eval_notes, eval_tables, number, percent
from liger_cli.evaluation.results import BEGIN, END, keep, read_results, rewrite_card
from liger_cli.evaluation.results_card import refresh_card
from liger_cli.system.errors import LigerError, UsageError
from liger_cli.system.outputs import write_whole
from liger_cli.system.tables import Table, print_tables

# perplexity, needles found, nats of the second reading
COLUMN = {
    "base": (2.0, 1.0, 0.2),
    "model": (4.0, 0.25, 3.0),
    "window_only": (3.0, 0.0, 4.0),
}


def _result(label="base", digest="a"):
    recovery = label == "base"
    return {
        "created": "2026-01-02T03:04:05+00:00",
        "command": ["liger", "eval"],
        "versions": {"liger": "0", "torch": None},
        "model": {"folder": "m", "fingerprint": {"digest": digest}, "base_column": {"label": label, "source": "s"}},
        "perplexity": {
            **{name: {"token": x, "byte": x / 2, "by_position": {"1-64": x}} for name, (x, _, _) in COLUMN.items()},
            "recovery": {"token": -0.71, "by_position": {"1-64": None}} if recovery else None,
            "text": {"name": "t", "tokens": 1000, "seq_len": 64},
        },
        "agreement": {
            **{
                name: {"kl": x - 2, "top1": 1 / x, "by_position": {"1-64": x - 2}} for name, (x, _, _) in COLUMN.items()
            },
            "recovery": {"kl": -1.0, "top1": 0.5, "by_position": {"1-64": -1.0}} if recovery else None,
            "text": {"name": "t", "tokens": 1000, "seq_len": 64},
        },
        "recall": {
            **{
                name: {"needle": {"512": {"exact": share, "digits": share}}, "second_reading": nats}
                for name, (_, share, nats) in COLUMN.items()
            },
            "recovery": {"needle": {"512": 0.25}, "second_reading": 0.26} if recovery else None,
            "count": 8,
            "gap": 300,
            "base_fails": None,
            "text": {"name": "t"},
        },
    }


def test_eval_tables():
    perplexity, agreement, recall = eval_tables(_result())
    assert perplexity.header == ["", "base", "model", "window only", "recovery"]
    assert perplexity.rows == [
        ["a token", "2.000", "4.000", "3.000", "-71.0 %"],
        ["at tokens 1-64", "2.000", "4.000", "3.000", "no gap"],
        ["a byte", "1.000", "2.000", "1.500", "-"],
    ]
    assert agreement.header == ["", "model", "window only", "recovery"]
    assert agreement.rows[1] == ["at tokens 1-64", "2.000", "1.000", "-100.0 %"]
    assert recall.rows == [
        ["a code stated 512 tokens before", "100.0 %", "25.0 %", "0.0 %", "25.0 %"],
        ["second reading, 300 tokens between: nats a token", "0.200", "3.000", "4.000", "26.0 %"],
    ]
    notes = eval_notes(_result())
    assert any("share of the gap between window only and base" in note for note in notes)
    assert any(note.startswith("no gap: window only is as good as the base") for note in notes)


def test_a_base_that_finds_nothing():
    """One line says it; there are no rows of zeros, and nothing to plot."""
    result = _result()
    result["recall"] |= {name: {"needle": {}, "second_reading": 1.0} for name in COLUMN} | {"base_fails": "128"}
    result["recall"]["base"]["needle"]["128"] = {"exact": 0.0, "digits": 0.1}
    result["recall"]["recovery"] = {"needle": {}, "second_reading": None}
    assert [row[0] for row in eval_tables(result)[2].rows] == ["second reading, 300 tokens between: nats a token"]
    assert any("the base itself answers 0 of 8 a mere 128 tokens back" in note for note in eval_notes(result))
    assert not any("a mere" in note for note in eval_notes(_result()))


def test_plots(tmp_path):
    """Only what was measured gets a panel, and nothing gets a file where nothing was."""
    assert position_plot(_result(), tmp_path) == ["evaluation.png", "evaluation.svg"]
    whole = (tmp_path / "evaluation.svg").stat().st_size
    result = _result()
    for values in (result["recall"][name] for name in COLUMN):
        values["needle"] = {}
    assert position_plot(result, tmp_path) and (tmp_path / "evaluation.svg").stat().st_size < 0.8 * whole
    del result["agreement"]
    assert position_plot(result, tmp_path / "nowhere") == []


def _with_tasks(published):
    figure = {"value": 0.5, "stderr": 0.01, "higher_is_better": True}
    result = _result()
    del result["perplexity"], result["agreement"], result["recall"]
    columns = {column: {"piqa": {"acc": figure}} for column in ("base", "model", "window_only")}
    settings = {"num_fewshot": None, "limit": None, "metadata": None}
    recovery = {"piqa": {"acc": 1.0}}
    chance = {"piqa": {"acc": 0.5}}
    found = {**columns, "recovery": recovery, "chance": chance, "settings": settings, "published": published}
    return {**result, "tasks": {**found, "details": {"piqa": {"num_fewshot": 5}}, "harness": {"lm_eval": "0.4.13"}}}


def test_published_figures_stand_apart():
    config = SimpleNamespace(model_type="liger_llama", hidden_size=4096, num_hidden_layers=32, vocab_size=128256)
    figures = published_figures(config)
    assert figures["label"] == "published" and figures["base"] == "Llama-3-8B"
    measured, published = eval_tables(_with_tasks(figures))
    assert measured.title == "lm-evaluation-harness 0.4.13"
    assert measured.rows == [["piqa", "5", "acc, %", "50.0 ± 1.0", "50.0 ± 1.0", "50.0 ± 1.0", "100.0 %"]]
    assert published.title.startswith("published") and "not measured here" in published.title
    assert published.header[0] == "published"
    rows = {row[0]: row[1:] for row in published.rows}
    assert rows["Liger-GLA-8B"] == ["0.02", "80.3", "81.1", "52.5", "76.3", "72", "43.4", "67.6", "72.4"]
    assert "**published" in published.markdown()


def test_a_perplexity_of_the_harness_is_no_percentage():
    result = _with_tasks(None)
    for column, value in (("base", 4.0), ("model", 5.0), ("window_only", 8.0)):
        result["tasks"][column] = {"t": {"perplexity": {"value": value, "stderr": None, "higher_is_better": False}}}
    result["tasks"] |= {"recovery": {"t": {"perplexity": 0.8}}, "chance": {"t": {"perplexity": 0.0}}}
    assert eval_tables(result)[0].rows == [["t", "-", "perplexity", "4.000", "5.000", "8.000", "80.0 %"]]
    result["tasks"]["model"]["t"]["perplexity"]["value"] = None
    result["tasks"]["recovery"]["t"]["perplexity"] = None
    assert eval_tables(result)[0].rows == [["t", "-", "perplexity", "4.000", "-", "8.000", "-"]]


def test_why_a_task_has_no_recovery():
    """At chance the base fails; where window only is within its error, there is no gap; else a share is shown."""
    result = _with_tasks(None)
    for base, window, share, shown in (
        (0.515, 0.40, None, "base fails"),
        (0.60, 0.58, None, "no gap"),
        (0.60, 0.50, 0.0, "0.0 %"),
    ):
        for column, value in (("base", base), ("model", 0.5), ("window_only", window)):
            figure = {"value": value, "stderr": 0.01, "higher_is_better": True}
            result["tasks"][column] = {"piqa": {"acc": figure}}
        result["tasks"]["recovery"] = {"piqa": {"acc": share}}
        assert eval_tables(result)[0].rows[0][-1] == shown


def test_the_share_of_examples_that_ran():
    result = _with_tasks(None)
    for limit, words in ((0.25, "(25.0 % of each task's examples)"), (8, "(the first 8 of each task's examples)")):
        result["tasks"]["settings"]["limit"] = limit
        assert words in eval_tables(result)[0].title


def test_no_figures_are_published_for_other_bases():
    config = SimpleNamespace(model_type="qwen3", hidden_size=4096, num_hidden_layers=32, vocab_size=128256)
    assert published_figures(config) is None
    result = _with_tasks(None)
    assert len(eval_tables(result)) == 1
    assert any("No figures are published" in note for note in eval_notes(result))


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_published_averages_are_those_of_the_scores(base):
    """Against slips of the pen: where every score is printed, they average to what is printed beside them."""
    for figures in base.figures:
        if None not in figures.scores:
            # 0.11: the paper averages scores of more digits than it prints.
            assert sum(figures.scores) / 6 == pytest.approx(figures.average, abs=0.11)
            assert sum(figures.scores[:5]) / 5 == pytest.approx(figures.average_without_mmlu, abs=0.11)


def test_no_recovery_without_the_base():
    tables = eval_tables(_result("softmax, tuned weights"))
    assert len(tables) == 3 and tables[0].header[1] == "softmax, tuned weights"
    assert all(row[-1] == "-" for table in tables for row in table.rows)
    assert any("--against" in note for note in eval_notes(_result("softmax, tuned weights")))


def test_markdown_and_csv():
    table = Table("a|b", ["x", "y"], [["1,2", "a|b"]])
    assert table.markdown().splitlines()[-1] == "| 1,2 | a\\|b |"
    assert list(csv.reader(io.StringIO(table.csv()))) == [["x", "y"], ["1,2", "a|b"]]


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (2.34567, "2.346"), (123.4, "123.4"), (98765.4, "9.88e+04")])
def test_numbers(value, shown):
    assert number(value) == shown


def test_percent():
    assert percent(None) == "-" and percent(0.0312) == "3.1 %"


def test_results_of_other_parts_stay(tmp_path):
    first = _result()
    del first["recall"], first["agreement"]
    keep(tmp_path, "eval", first)
    keep(tmp_path, "bench", {"rows": []})
    second = _result()
    del second["perplexity"]
    keep(tmp_path, "eval", second)
    found = read_results(tmp_path)
    assert set(found["eval"]) >= {"perplexity", "recall"} and found["bench"] == {"rows": []}


def test_what_an_earlier_run_measured_has_its_stamp(tmp_path):
    """A later run changes neither when and with what it was measured, nor the plots of it."""
    first = {**_result(), "created": "2026-01-01T01:01:01+00:00", "seed": 7, "plots": ["evaluation.png"]}
    del first["perplexity"]
    keep(tmp_path, "eval", first)
    for _ in range(2):
        second = {**_result(), "seed": 8, "plots": []}
        del second["recall"]
        assert keep(tmp_path, "eval", second) == []
    found = read_results(tmp_path)["eval"]
    assert found["seed"] == 8 and "measured" not in found["perplexity"] and found["plots"] == ["evaluation.png"]
    assert found["recall"]["measured"] == {name: first[name] for name in ("created", "command", "versions", "seed")}
    text = refresh_card(tmp_path).read_text()
    assert "Measured 2026-01-02 03:04 UTC" in text and "Recall: measured 2026-01-01 01:01 UTC" in text
    assert "![Evaluation](evaluation.png)" in text


def test_results_of_other_weights_go(tmp_path):
    first = _result(digest="a")
    del first["recall"]
    keep(tmp_path, "eval", first)
    second = _result(digest="b")
    del second["perplexity"]
    assert keep(tmp_path, "eval", second) == ["perplexity"]
    assert "perplexity" not in read_results(tmp_path)["eval"]


@pytest.mark.parametrize(
    "other",
    [{"dtype": "bfloat16"}, {"base_column": {"label": "base", "source": "another"}}, {"adapter": {"digest": "c"}}],
)
def test_results_of_another_setting_go(tmp_path, other):
    """One card has one base column, dtype and adapter: figures of another would stand under a wrong heading."""
    keep(tmp_path, "eval", _result())
    second = _result()
    second["model"] |= other
    del second["perplexity"]
    assert keep(tmp_path, "eval", second) == ["perplexity"]
    assert "perplexity" not in read_results(tmp_path)["eval"]


def test_the_card_shows_samples(tmp_path):
    sample = {"prompt": "Once | upon", "base": " a time", "model": " a  a a", "window_only": "x"}
    keep(tmp_path, "eval", {**_result(), "samples": [sample]})
    assert "| Once \\| upon | a time |" in refresh_card(tmp_path).read_text()


def test_cells_are_whole(capsys):
    """At 80 columns headers are wrapped; figures and names are neither broken nor cut."""
    header = ["task", "the longest of all headers", "another header of some length", "and a third one", "y"]
    cells = ["word_perplexity", "54.6 ± 13", "1234.5 ± 12", "0.753 ± 0.02", "100.0 %"]
    title = ("a title " * 20).strip()
    print_tables([Table(title, header, [cells])])
    out = capsys.readouterr().out
    assert title in out and all(cell in out for cell in cells)
    print_tables([Table("t", ["a"] * 3, [["x" * 70, "y" * 70, "z"]])])  # wider than the terminal: broken, not cut
    assert capsys.readouterr().out.count("y") == 70


def test_card_is_rewritten_in_place(tmp_path):
    (tmp_path / "README.md").write_text(f"# Mine\n\n{BEGIN}\nold \\1\n{END}\n\n## After\n")
    rewrite_card(tmp_path, "new \\1 \\g<0>")
    text = (tmp_path / "README.md").read_text()
    assert text == f"# Mine\n\n{BEGIN}\n\nnew \\1 \\g<0>\n\n{END}\n\n## After\n"
    keep(tmp_path, "eval", _result())
    refresh_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Mine") and text.endswith("## After\n") and "| a token | 2.000 |" in text


def test_a_linked_file_is_not_written_through(tmp_path):
    import os

    original = tmp_path / "base.md"
    original.write_text("base")
    os.link(original, tmp_path / "README.md")
    write_whole(tmp_path / "README.md", "new")
    assert original.read_text() == "base"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["README.md", "base.md"]


def test_comparison(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        keep(tmp_path / name, "eval", _result())
    files = (str(tmp_path / "a"), str(tmp_path / "b" / "results.json"))
    evaluate.run(compare=files, output_format="md")
    out = capsys.readouterr().out
    assert "**recall: the model (its base; its window alone)**" in out
    assert "| a code stated 512 tokens before, % | 25 (100; 0) | 25 (100; 0) |" in out and "results.json" not in out
    assert "| at tokens 1-64 | 2.000 (0.000; 1.000) | 2" in out
    assert "**perplexity of t, rows of 64: the model" in out and "| a token | 4.000 (2.000; 3.000) | 4.000 (" in out
    evaluate.run(compare=files, output_format="json")
    assert set(json.loads(capsys.readouterr().out)) == set(files)
    keep(tmp_path / "b", "eval", _result("softmax, tuned weights"))
    evaluate.run(compare=files)
    assert f"{files[1]}: in place of its base stands softmax, tuned weights." in capsys.readouterr().out


def test_what_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not there"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(LigerError, match="not a results file|not a JSON object"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(LigerError, match="not valid JSON"):
        read_results(tmp_path)


@pytest.mark.parametrize("columns", [30, 40, 60, 200])
def test_tables_lose_nothing_on_narrow_terminals(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    figures = [f"{index}.25 ± 0.5" for index in range(8)]
    table = Table("Speeds", ["tokens", *(f"column number {index}" for index in range(8))], [["1,024", *figures]])
    print_tables([table])
    out = capsys.readouterr().out
    assert all(figure.split()[0] in out for figure in figures) and "1,024" in out and "…" not in out
    assert max(map(len, out.splitlines())) <= columns
