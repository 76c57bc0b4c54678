"""`--push-to-hub`: what goes up, what stays private, what is refused; nothing here reaches the hub."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest

from liger_cli.checkpoint import publish
from liger_cli.commands import convert, merge
from liger_cli.system.errors import LigerError, SetupError, UsageError
from liger_cli.system.manifest import new_manifest, read_manifest, write_manifest


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes everything: what was asked of it, and the files of the upload with their contents."""
    asked, uploaded = [], {}

    class Api:
        def whoami(self):
            asked.append("whoami")

        def create_repo(self, repo, **options):
            asked.append((repo, options))

        def upload_folder(self, repo_id, folder_path, commit_message):
            for path in Path(folder_path).rglob("*"):
                if path.is_file():
                    uploaded[str(path.relative_to(folder_path))] = path.read_bytes()
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return asked, uploaded


@pytest.fixture
def adapter(tiny_base, tmp_path):
    """An adapter of a converted folder."""
    from peft import LoraConfig, get_peft_model

    from liger_cli.checkpoint.model_code import load_model

    folder = tmp_path / "tiny-liger"
    convert.convert(str(tiny_base()), str(folder))
    tuned = get_peft_model(load_model(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "lora")
    write_manifest(tmp_path / "lora", new_manifest("adapter", base={"path": str(folder)}))
    return tmp_path / "lora"


def assert_private(uploaded, *secrets):
    for name, content in uploaded.items():
        for secret in (str(Path.home()) + "/", *map(str, secrets)):
            assert secret.encode() not in content, (name, secret)


def test_convert_uploads_the_folder_without_this_machines_paths(hub, tiny_base, tmp_path, monkeypatch):
    asked, uploaded = hub
    monkeypatch.setattr("sys.argv", ["liger", "convert", str(tiny_base()), "--output", f"{Path.home()}/secret/x"])
    convert.run(base=str(tiny_base()), output=str(tmp_path / "out"), push_to_hub="me/tiny-liger", as_json=True)
    assert asked == ["whoami", ("me/tiny-liger", {"private": True, "exist_ok": True})]
    there = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(uploaded) == there
    weights = "model.safetensors"
    assert uploaded[weights] == (tmp_path / "out" / weights).read_bytes()
    manifest = json.loads(uploaded["liger.json"])
    assert manifest["base"]["path"] == tiny_base().name and "command" not in manifest
    assert manifest["fingerprint"] == read_manifest(tmp_path / "out")["fingerprint"]
    assert_private(uploaded, tmp_path, tiny_base().parent)
    assert read_manifest(tmp_path / "out")["base"]["path"] == str(tiny_base())  # the folder keeps its own


def test_merge_uploads_what_it_wrote(hub, adapter, tmp_path, capsys):
    _, uploaded = hub
    report = merge.run(adapter, output=tmp_path / "merged", push_to_hub="tiny-merged", as_json=True)
    assert json.loads(capsys.readouterr().out)["push"] == report["push"]
    assert report["push"]["uploaded"] and report["push"]["url"] == "https://hub/tiny-merged"
    assert report["push"]["files"] == {name: len(content) for name, content in uploaded.items()}
    assert uploaded["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert_private(uploaded, tmp_path)


def test_dry_runs_ask_nothing_and_write_nothing(tiny_base, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    before = sorted(tmp_path.rglob("*"))
    convert.run(base=str(tiny_base()), output=str(tmp_path / "out"), push_to_hub="me/x", dry_run=True, as_json=True)
    planned = json.loads(capsys.readouterr().out)["push"]
    report = merge.run(adapter, output=tmp_path / "merged", push_to_hub="me/x", dry_run=True)
    said = capsys.readouterr().err
    assert "would upload" in said and "model.safetensors" in said and "would write" in said
    assert sorted(tmp_path.rglob("*")) == before
    convert.convert(str(tiny_base()), str(tmp_path / "out"))
    merge.run(adapter, output=tmp_path / "merged", quiet=True)
    for name, push in (("out", planned), ("merged", report["push"])):
        folder = tmp_path / name
        assert not push["uploaded"]
        assert set(push["files"]) == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for file, size in push["files"].items():
            assert size is None or size == (folder / file).stat().st_size


def test_refused_before_any_work(tiny_base, adapter, tmp_path, monkeypatch):
    for repo in ("a/b/c", "/home/me/x", "me/", "a b", "", "me/x--y", "-x"):
        with pytest.raises(UsageError, match="OWNER/NAME"):
            publish.check(repo)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for run in (
        lambda: convert.convert(str(tiny_base()), str(tmp_path / "out"), push_to_hub="me/x"),
        lambda: merge.run(adapter, output=tmp_path / "out", push_to_hub="me/x", quiet=True),
    ):
        with pytest.raises(SetupError, match="hf auth login") as error:
            run()
        assert error.value.exit_code == 4
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")

    class Unreachable:
        def whoami(self):
            raise ConnectionError("no route\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    with pytest.raises(SetupError, match=r"\(no route\); check the network"):
        convert.convert(str(tiny_base()), str(tmp_path / "out"), push_to_hub="me/x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("config.json", {"_name_or_path": "/home/alice/Qwen3-8B"}, {"_name_or_path": "Qwen3-8B"}),
        ("tokenizer_config.json", {"name_or_path": "Qwen/Qwen3-8B"}, {"name_or_path": "Qwen/Qwen3-8B"}),
        ("other.json", {"path": "/usr/share"}, {"path": "/usr/share"}),
        (
            "liger.json",
            {"command": ["liger", "/a/b"], "base": {"path": "/a/b"}, "adapters": [{"path": "~/c"}]},
            {"base": {"path": "b"}, "adapters": [{"path": "c"}]},
        ),
        ("tokenizer.json", {"vocab": {f"{Path.home()}/": 1}}, {"vocab": {f"{Path.home()}/": 1}}),
    ],
)
def test_fields_that_hold_a_path_hold_its_last_part(tmp_path, name, content, wanted):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text(json.dumps(content))
    publish.stage(tmp_path / "model", tmp_path / "staged")
    assert json.loads((tmp_path / "staged" / name).read_text()) == wanted


def test_a_record_that_holds_a_folder_of_this_machine_is_not_uploaded(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.md").write_text(f"made in {tmp_path}/base")
    with pytest.raises(LigerError, match="notes.md holds .* so nothing was uploaded; take it out"):
        publish.stage(tmp_path / "model", tmp_path / "staged")


def test_hidden_files_and_caches_stay(tmp_path):
    folder = tmp_path / "model"
    for name in ("config.json", ".secret", "__pycache__/x.pyc", ".git/config", "deep/notes.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    files = publish.stage(folder, tmp_path / "staged")
    assert set(files) == {"config.json", os.path.join("deep", "notes.md")}
