"""Progress off a terminal: a line now and then, and none for what is quick."""

from liger_cli.system import progress


def test_lines_off_a_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress("reading", 6) as step:
        for _ in range(6):
            now[0] += 11
            step()
    assert capsys.readouterr().err.splitlines() == [
        "liger: reading: 2 of 6", "liger: reading: 4 of 6", "liger: reading: 6 of 6",
    ]  # fmt: skip
    with progress.progress("reading", 6) as step:
        step()
    assert capsys.readouterr().err == ""
