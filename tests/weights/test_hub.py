"""`model.path` as a hub name, offline: a cache as the hub's client lays it out, built here from a tiny model."""

import hashlib
import json
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny
import yaml
from runs import model_directory, preference_file, raw_config
from safetensors.numpy import load_file, save_file

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.inspect.inspect import inspect_model, parse_mesh
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights import directory as weights
from sr_dpo_jax.weights import hub

pytestmark = pytest.mark.usefixtures("same_programs")

FIRST, SECOND = "0123456789abcdef" * 2 + "01234567", "f" * 40
TOKEN = "hf_canary_0123456789"


def snapshot(cache: Path, commit: str, source: Path) -> Path:
    """Adds a commit of org/tiny to the cache: files are links to blobs, as the client makes them."""
    repository = cache / "models--org--tiny"
    folder = repository / "snapshots" / commit
    for path in sorted(source.rglob("*")):
        if path.is_file():
            blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            link = folder / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path("../" * len(link.relative_to(repository).parent.parts)) / "blobs" / blob.name)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return folder


def model_of(path: Path, seed: int) -> Path:
    model_directory(path)
    directory = weights.open_directory(str(path))
    model = tiny.build(directory.architecture, tiny.make_mesh())
    tiny.save_weights(model.params(seed), directory, model.abstract, path, shard_bytes=30_000)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two commits of org/tiny, the second of which is main; a token that must never show."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "set in conftest.py"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for seed, commit in enumerate((FIRST, SECOND)):
        snapshot(cache, commit, model_of(tmp_path / f"model{seed}", seed))
    return cache


def test_a_name_is_resolved_to_a_commit(cache, tmp_path):
    newest = weights.open_directory("org/tiny")
    assert newest.revision == SECOND
    pinned = weights.open_directory("org/tiny", revision=FIRST)
    assert pinned.revision == FIRST and pinned.path.name == FIRST
    assert weights.weights_digest(pinned) == weights.weights_digest(weights.open_directory(str(tmp_path / "model0")))
    assert weights.weights_digest(newest) != weights.weights_digest(pinned)
    by_path = weights.open_directory(str(pinned.path))
    assert by_path.revision is None, "a snapshot that the user names is a directory"
    abstract = tiny.build(by_path.architecture, tiny.make_mesh()).abstract
    assert weights.check(by_path, abstract).keys() == weights.check(pinned, abstract).keys()


def test_links_of_a_snapshot_may_lead_to_its_blobs_only(cache, tmp_path):
    directory = weights.open_directory("org/tiny")
    abstract = tiny.build(directory.architecture, tiny.make_mesh()).abstract
    file = next(directory.path.glob("model-*.safetensors"))
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(outside)
    with pytest.raises(UsageError, match=f"{file.name}: is a link that leaves"):
        weights.check(directory, abstract)


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("org/tiny", "v2", ["org/tiny", "model.revision=v2", "local cache"]),
        ("org/tiny", "a" * 40, ["org/tiny", "model.revision=aaaa", "local cache"]),
        ("org/missing", None, ["org/missing", "neither a directory nor in the local cache"]),
        ("org/missing/file", None, ["org/missing/file", "owner/name"]),
        ("org/tiny", "../../../../odd", ["model.revision=../../../../odd"]),
        ("org/tiny", "odd", ["'..'", "no commit"]),
    ],
)
def test_unknown_names_and_revisions(cache, tmp_path, name, revision, words):
    (tmp_path / "odd").write_text(FIRST)
    (cache / "models--org--tiny" / "refs" / "odd").write_text("..")
    with pytest.raises(UsageError) as error:
        weights.open_directory(name, revision=revision)
    for word in words:
        assert word in str(error.value)
    assert TOKEN not in str(error.value)


def test_what_the_hub_answers_is_put_in_plain_words(monkeypatch):
    """Errors of the client, made as it makes them: each has its own remedy, none repeats an address or a header."""
    response = types.SimpleNamespace(status_code=404, headers={"authorization": TOKEN}, request=None)
    for kind, words in (
        (huggingface_hub.errors.RevisionNotFoundError, "no such revision"),
        (huggingface_hub.errors.GatedRepoError, "consent"),
        (huggingface_hub.errors.RepositoryNotFoundError, "neither a directory nor a name on the hub"),
        (huggingface_hub.errors.HfHubHTTPError, "HfHubHTTPError"),
    ):

        def refuse(*_, kind=kind, **__):
            raise kind(f"https://user:{TOKEN}@example.invalid", response=response)

        monkeypatch.setattr(hub, "snapshot_download", refuse)
        with pytest.raises(UsageError, match=words) as error:
            weights.open_directory("org/tiny", revision="v1")
        assert TOKEN not in str(error.value) and "example" not in str(error.value)


def test_only_files_that_are_needed_are_fetched(cache, monkeypatch):
    """First config, tokenizer and index, then the shards that the index names, of the commit that came first."""
    asked = []

    def download(name, **options):
        asked.append((options["revision"], options["allow_patterns"]))
        return huggingface_hub.snapshot_download(name, **options)

    monkeypatch.setattr(hub, "snapshot_download", download)
    directory = weights.open_directory("org/tiny")
    shards = sorted(file.name for file in directory.path.glob("*.safetensors"))
    assert [revision for revision, _ in asked] == [None, SECOND]
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(asked[0][1])
    assert asked[1][1] == shards and len(shards) > 2
    asked.clear()
    weights.open_directory("org/tiny", weights=False)
    assert len(asked) == 1


class Hub:
    """The hub as far as `inspect` asks it: names of files, and headers made of the bytes that a range gives."""

    def __init__(self, monkeypatch, source: Path, *, cut: str | None = None):
        self.source, self.cut, self.asked = source, cut, []
        monkeypatch.setattr(hub, "list_repo_files", self.names)
        monkeypatch.setattr(hub, "parse_safetensors_file_metadata", self.header)

    def names(self, name, *, revision):
        assert (name, revision) == ("org/tiny", SECOND)
        return sorted(file.name for file in self.source.iterdir())

    def header(self, name, file, *, revision):
        assert (name, revision) == ("org/tiny", SECOND)
        self.asked.append(file)
        if not (self.source / file).exists():
            response = types.SimpleNamespace(status_code=404, headers={}, request=None)
            raise huggingface_hub.errors.RemoteEntryNotFoundError(TOKEN, response=response)
        if file == self.cut:
            raise huggingface_hub.errors.SafetensorsParsingError(TOKEN)
        content = (self.source / file).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        found = {
            tensor: types.SimpleNamespace(shape=fields["shape"], dtype=fields["dtype"])
            for tensor, fields in header.items()
            if tensor != "__metadata__"
        }
        return types.SimpleNamespace(tensors=found)


@pytest.fixture
def without_weights(cache):
    """The cache as after fetching all but the weights of the second commit."""
    for link in (cache / "models--org--tiny" / "snapshots" / SECOND).glob("model-*.safetensors"):
        link.resolve().unlink()
        link.unlink()
    return cache


def inspected(name="org/tiny", digest=False):
    return inspect_model(name, revision=None, mesh=parse_mesh("fsdp=8"), prompt="Be good.", digest=digest)


def test_inspecting_fetches_headers_and_no_weights(cache, tmp_path, monkeypatch):
    """Headers read from the hub equal those of the files; fetched weights are inspected as those of a directory."""
    here = inspected()
    assert here.not_looked_at == () and here.problems == ()
    asked = []

    def download(name, **options):
        asked.append(options["allow_patterns"])
        return huggingface_hub.snapshot_download(name, **options)

    monkeypatch.setattr(hub, "snapshot_download", download)
    for link in (cache / "models--org--tiny" / "snapshots" / SECOND).glob("model-*.safetensors"):
        link.unlink()
    there = Hub(monkeypatch, tmp_path / "model1")
    found = inspected()
    assert found.weights == here.weights and found.problems == () and found.has_weights is True
    assert "only the headers of the files are fetched" in found.not_looked_at[0]
    assert len(asked) == 1 and not [name for name in asked[0] if name.endswith(".safetensors")]
    assert there.asked == sorted(file.name for file in (tmp_path / "model1").glob("model-*.safetensors"))


def test_faults_that_headers_show(without_weights, tmp_path, monkeypatch, capsys):
    source = tmp_path / "model1"
    first, second, third = sorted(source.glob("model-*.safetensors"))[:3]
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name].astype(np.int32)}, first)
    second.unlink()
    Hub(monkeypatch, source, cut=third.name)
    assert main(["inspect", "org/tiny"]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{name}: type I32" in printed and f"{second.name}: missing on the hub" in printed
    assert f"{third.name}: not a sound safetensors file" in printed and TOKEN not in printed


def test_a_hub_that_is_not_reached_leaves_the_weights_unseen(without_weights, capsys):
    """HF_HUB_OFFLINE is set in every test: the client itself refuses."""
    assert main(["inspect", "org/tiny"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "not looked at, see below" in printed
    assert "Not looked at: the weights: org/tiny: HF_HUB_OFFLINE is set" in printed and "model.init" not in printed


def test_a_hub_name_without_safetensors(cache, tmp_path, monkeypatch, capsys):
    """Weights in .bin alone are a problem, none at all are not."""
    source = tmp_path / "model1"
    for file in [*source.glob("model*"), *(cache / "models--org--tiny" / "snapshots" / SECOND).glob("model*")]:
        file.unlink()
    there = Hub(monkeypatch, source)
    assert main(["inspect", "org/tiny"]) == 0
    assert "none in safetensors" in capsys.readouterr().out
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert main(["inspect", "org/tiny"]) == 2
    assert "org/tiny: pytorch_model.bin is not read" in " ".join(capsys.readouterr().out.split())
    assert there.asked == []


def test_a_download_cut_short_is_named(without_weights):
    blobs = without_weights / "models--org--tiny" / "blobs"
    (blobs / "0f0f.incomplete").write_bytes(b"half")
    directory = weights.open_directory("org/tiny")
    abstract = tiny.build(directory.architecture, tiny.make_mesh()).abstract
    with pytest.raises(UsageError, match=r"blobs/0f0f.incomplete is a download that was cut short"):
        weights.check(directory, abstract)


def test_a_revision_of_a_directory_is_refused(tmp_path):
    with pytest.raises(UsageError, match="pins a hub name"):
        weights.open_directory(str(model_directory(tmp_path)), revision="main")


def test_a_run_records_the_commit_and_exports_by_it(cache, tmp_path, capsys):
    """main moves on after the run: the export still takes config and tokenizer of the commit that was trained."""
    data = preference_file(tmp_path / "pairs.jsonl", 8)
    model = {"path": "org/tiny", "init": "pretrained"}
    raw = raw_config(tmp_path, Path("org/tiny"), data, model=model, train={"max_steps": 1})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert main(["train", str(path)]) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["model"] == {"path": "org/tiny", "revision": SECOND}
    later = model_directory(tmp_path / "later", num_hidden_layers=3)
    snapshot(cache, "e" * 40, later)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/tiny" in card and SECOND in card
    assert main(["train", str(path), "model.revision=v9", f"output_dir={tmp_path / 'other'}"]) == 2
    message = capsys.readouterr()
    assert "model.revision=v9" in message.err and not (tmp_path / "other").exists()
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
    assert TOKEN not in message.err + message.out
    assert np.isfinite(json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"])
