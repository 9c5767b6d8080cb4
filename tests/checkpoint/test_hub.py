"""Names to folders: the cache first, then the hub, on from where a download stopped; and one line for each mishap."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, file_download

import blip2
from blip2 import checkpoint
from blip2.checkpoint import hub as our_hub
from blip2.checkpoint.names import pull, resolve
from blip2.errors import CheckpointError
from blip2.published import PUBLISHED
from tests import tiny
from tests.checkpoint.fake_hub import COMMIT, NAME, FakeHub, serving

WEIGHTS = "model.safetensors"
LOST = 10_000  # bytes in buffers when a process is killed


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def go_online(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    if hasattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(opt_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has a tiny model, and nothing of it in the cache."""
    with serving(opt_model) as fake:
        go_online(monkeypatch, fake.url)
        yield fake


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def one_line(caught: pytest.ExceptionInfo[CheckpointError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_name_is_fetched_once_without_its_pickled_twins(
    hub: FakeHub, opt_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve(NAME)
    assert {file for file, _ in hub.asked} == {path.name for path in opt_model.iterdir()}
    ours, theirs = checkpoint.load(folder), checkpoint.load(opt_model)
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    hub.refusal = (500, "")
    assert resolve(NAME) == folder  # from the cache, without asking
    go_offline(monkeypatch)
    assert resolve(NAME) == resolve(NAME, revision=COMMIT) == resolve(NAME, local_files_only=True) == folder


def test_several_files_of_weights(
    cache: Path, opt_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = opt_model / "tokenizer.json"
    checkpoint.save(checkpoint.load(opt_model), tmp_path / "split", tokenizer=tokenizer, max_shard_size_bytes=30_000)
    with serving(tmp_path / "split") as fake:
        go_online(monkeypatch, fake.url)
        folder = resolve(NAME)
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        assert len(shards) > 2
        (folder / shards[1]).resolve().unlink()  # as if interrupted between two files
        (folder / shards[1]).unlink()
        fake.asked.clear()
        go_offline(monkeypatch)
        with pytest.raises(CheckpointError, match=f"{shards[1]} is not yet in the cache; load it once with a network"):
            resolve(NAME)
        go_online(monkeypatch, fake.url)
        assert resolve(NAME) == folder
        assert fake.asked == [(shards[1], "")]
    checkpoint.load(folder)


def test_a_download_goes_on_where_it_stopped(
    cache: Path, opt_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line breaks once, then falls silent and the process is killed: only what was under way is fetched twice."""
    third = (opt_model / WEIGHTS).stat().st_size // 3
    with serving(opt_model, cut_after={WEIGHTS: [third, third]}, stall_after_cuts=True) as fake:
        environment = os.environ | {
            "HF_ENDPOINT": fake.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        program = (
            "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1024\n"  # the model is a small one
            f"from blip2.checkpoint.names import resolve; resolve({NAME!r})"
        )
        command = [sys.executable, "-c", program]
        process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
        try:
            _wait_for(lambda: sum(part.stat().st_size for part in cache.rglob("*.part")) > 2 * third - LOST)
        finally:
            process.kill()
            process.wait()
        go_online(monkeypatch, fake.url)
        fake.cut_after.clear()
        folder = resolve(NAME)
    starts = [int(asked[6:-1] or 0) for file, asked in fake.asked if file == WEIGHTS]
    assert starts[0] == 0
    assert third - LOST < starts[1] <= third
    assert 2 * third - LOST < starts[2] <= 2 * third
    assert len(starts) == 3
    assert (folder / WEIGHTS).read_bytes() == (opt_model / WEIGHTS).read_bytes()
    assert not list(cache.rglob("*.part"))


def _wait_for(condition, limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_published_name_is_its_pinned_commit(cache: Path, opt_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Salesforce/blip2-opt-2.7b"
    pinned = PUBLISHED[name].revision
    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(our_hub.HfApi, "model_info", lambda *a, **k: None)
    monkeypatch.setattr(
        our_hub, "snapshot_download", lambda *a, revision, **k: asked.append(revision) or str(opt_model)
    )
    assert resolve(name) == opt_model
    resolve(name, revision="main")
    pull("somebody/else")
    assert asked == [pinned, "main", "main"]


def test_without_a_network_the_newest_does_for_the_pinned(
    cache: Path, opt_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "Salesforce/blip2-opt-2.7b"
    repository = cache / "models--Salesforce--blip2-opt-2.7b"
    shutil.copytree(opt_model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert resolve(name) == repository / "snapshots" / COMMIT
    with pytest.raises(CheckpointError, match="neither a folder nor in the cache in revision 1234") as caught:
        resolve(name, revision="1234")
    one_line(caught)


@pytest.mark.parametrize("has_branch", [True, False])
def test_without_a_network_another_commit_does_and_is_told(
    cache: Path, opt_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_branch: bool
) -> None:
    name = "Salesforce/blip2-opt-2.7b"
    repository = cache / "models--Salesforce--blip2-opt-2.7b"
    here = repository / "snapshots" / COMMIT
    shutil.copytree(opt_model, here)
    if has_branch:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    said = f"the pinned commit {PUBLISHED[name].revision} is not in the cache; using commit {COMMIT}"
    assert resolve(name) == here and said in caplog.text
    caplog.clear()
    go_online(monkeypatch, "http://127.0.0.1:9")  # nobody listens there
    assert resolve(name) == here and said in caplog.text
    for wanted in ({"revision": "v9"}, {"revision": PUBLISHED[name].revision}):
        with pytest.raises(CheckpointError):
            resolve(name, **wanted)
    (here / "tokenizer.json").unlink()
    go_offline(monkeypatch)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not yet in the cache"):
        resolve(name)
    (here / "config.json").write_text("{")  # damaged: as if it were not there
    with pytest.raises(CheckpointError):
        resolve(name)


@pytest.mark.parametrize("lost", ["tokenizer.json", "preprocessor_config.json", WEIGHTS, "cut weights"])
def test_what_is_there_in_part_is_not_taken_for_whole(
    hub: FakeHub, opt_model: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """As another program leaves it that was stopped, or that fetched only what it needed; then it is fetched."""
    folder = resolve(NAME)
    (folder / WEIGHTS if lost == "cut weights" else folder / lost).resolve().unlink()
    if lost == "cut weights":
        (folder / WEIGHTS).resolve().write_bytes(hub.files[WEIGHTS][:-1])
    go_offline(monkeypatch)
    with pytest.raises(CheckpointError, match=f"{lost.replace('cut weights', WEIGHTS)} is not yet in the cache"):
        resolve(NAME)
    go_online(monkeypatch, hub.url)
    assert resolve(NAME) == folder
    checkpoint.load(folder)
    assert {file.name for file in folder.iterdir()} >= {file.name for file in opt_model.iterdir()}


def test_an_instructblip_has_its_second_tokenizer(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny.save_instructed("t5", tmp_path / "instructed")) as fake:
        go_online(monkeypatch, fake.url)
        folder = resolve(NAME)
        (folder / "qformer_tokenizer" / "tokenizer.json").resolve().unlink()
        go_offline(monkeypatch)
        with pytest.raises(CheckpointError, match=r"qformer_tokenizer/tokenizer\.json is not yet in the cache"):
            resolve(NAME)
        go_online(monkeypatch, fake.url)
        assert resolve(NAME) == folder
    assert blip2.load(folder).speaker.instruction("how many dogs?")


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((404, "RepoNotFound"), "neither a folder nor on the hub; check the name"),
        ((401, "RepoNotFound"), "neither a folder nor on the hub; check the name, or, if it is private, run: hf auth"),
        ((403, "GatedRepo"), f"is gated; accept its conditions at https://huggingface.co/{NAME}"),
        ((403, ""), r"the hub denied access \(403\); run: hf auth login"),
        ((503, ""), "the download failed .*503.*; check the network and try again"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: FakeHub, refusal: tuple[int, str], message: str) -> None:
    hub.refusal = refusal
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(NAME)
    assert NAME in one_line(caught)


def test_no_such_revision(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="no revision v9; set revision='main', or another") as caught:
        resolve(NAME, revision="v9")
    one_line(caught)


def test_only_pickled_weights(hub: FakeHub) -> None:
    del hub.files[WEIGHTS]
    with pytest.raises(CheckpointError, match="has no safetensors weights in revision main") as caught:
        resolve(NAME)
    one_line(caught)


@pytest.mark.parametrize("name", [NAME, "Salesforce/blip2-opt-2.7b"])
def test_no_network(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    go_online(monkeypatch, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(CheckpointError, match="check the network and try again") as caught:
        resolve(name)
    one_line(caught)
    assert capsys.readouterr() == ("", "")  # no word of trying again and again


def test_no_space(hub: FakeHub, cache: Path) -> None:
    hub.claimed_sizes[WEIGHTS] = 10**16
    with pytest.raises(CheckpointError, match=r"no space is left in .*cache .*10000000\.0 GB.*free some, or") as caught:
        resolve(NAME)
    one_line(caught)
    assert not hub.asked or WEIGHTS not in {file for file, _ in hub.asked}


def test_what_arrived_damaged_is_not_kept(hub: FakeHub, cache: Path) -> None:
    hub.claimed_checksums[WEIGHTS] = "0" * 64
    with pytest.raises(CheckpointError, match=r"model\.safetensors was damaged.*try again") as caught:
        resolve(NAME)
    one_line(caught)
    assert not list(cache.rglob("*.part"))


def test_an_index_that_points_out_of_the_folder_fetches_nothing(hub: FakeHub) -> None:
    hub.files["model.safetensors.index.json"] = b'{"weight_map": {"a": "../../secret.safetensors"}}'
    with pytest.raises(CheckpointError, match=r"'../../secret.safetensors' is not a .safetensors file of this folder"):
        resolve(NAME)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blip2_pretrained.pth", "blip2_pretrained.pth: is a checkpoint of the authors' code; .* blip2 convert"),
        ("no--such..name/x", "is not a valid repository name"),
        ("no/such/folder", "no such folder; give the folder of a model, a hub name such as Salesforce/blip2-opt-2.7b"),
        ("nobody/nothing", "nobody/nothing: is neither a folder nor in the cache; load it once with a network"),
    ],
)
def test_a_name_that_is_nothing_is_one_line(cache: Path, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(name)
    one_line(caught)


def test_a_file_in_place_of_its_folder(opt_model: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        resolve(opt_model / WEIGHTS)
