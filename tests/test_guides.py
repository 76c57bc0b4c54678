"""The README and its guides: short, linked, installed; their commands exist, and their Python runs."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from liger_cli.main import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "liger_cli" / "guides").glob("*.md"))
PAGES = (README, *GUIDES)


def code(page: Path) -> list[str]:
    """Lines of the page's code blocks, indented or fenced; and what stands between backticks and begins with liger."""
    text, fenced, found = page.read_text(encoding="utf-8"), False, []
    for line in text.splitlines():
        if line.strip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            found.append(line.strip())
    return found + re.findall(r"`(liger [^`]+)`", text)


def commands(page: Path) -> list[list[str]]:
    """Every use of `liger` in the page's code, as words."""
    found = []
    for line in code(page):
        for part in re.split(r"&&|>|\s#", line):
            words = shlex.split(part) if part.strip().startswith("liger ") else []
            found += [words[1:]] if words else []
    return found


def test_the_readme_is_short_and_a_guide_is_two_screens():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200
    assert len(GUIDES) >= 8
    for page in GUIDES:
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 110, page.name


def test_every_link_leads_somewhere():
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                linked |= {(page.parent / target).resolve()} if page == README else set()
    assert {page.resolve() for page in GUIDES} <= linked, "a guide that the README does not name"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_and_option_exists(page):
    known = typer.main.get_command(app).commands
    for words in commands(page):
        if words[0].startswith("-"):
            continue
        assert words[0] in known, f"liger {' '.join(words)}"
        options = {name for one in known[words[0]].params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
        given = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
        assert given <= options, f"liger {' '.join(words)}: {given - options}"


def test_the_commands_are_found_at_all():
    assert ["convert", "BASE", "--calibrate"] in commands(ROOT / "liger_cli" / "guides" / "calibration.md")
    assert len(commands(README)) > 10


def python(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]


def test_the_functions_example_runs(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": " ".join(f"w{4 + (row * place) % 90}" for place in range(80))} for row in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "BASE").symlink_to(tiny_base())
    exec(python(ROOT / "liger_cli" / "guides" / "python.md"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "bytes in place of" in printed[0] and float(printed[1]) > 1


def test_the_readmes_snippet_loads_what_its_lines_made(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base(), "Qwen3-8B")
    run = CliRunner().invoke(app, ["convert", "./Qwen3-8B", "--gate", "gla"])
    assert run.exit_code == 0, run.output
    snippet = python(README)
    assert '"Qwen3-8B-liger-gla-calibrated-merged"' in snippet
    exec(snippet.replace("-calibrated-merged", ""), {})
    assert capsys.readouterr().out.strip()
