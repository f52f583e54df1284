"""Every hub through its real client, against a server on loopback that speaks its protocol: whole, or one message."""

from __future__ import annotations

import json
import shutil
import time
import types
from pathlib import Path

import modelscope_hub.config
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from finetune.errors import CheckpointError, DataError, FinetuneError, HubError, StorageError
from finetune.model.hubs import huggingface, store
from finetune.model.hubs.fetch import HUBS, fetch
from finetune.model.hubs.hub import Repo, parse_repo
from finetune.model.resolve import resolve_model
from finetune.rows.datafiles import find_files
from tests.chat.conftest import From
from tests.model.hub_server import COMMIT, REPO, serve
from tests.rows.reading import read_rows
from tests.runs import finetune

HUB_NAMES = ("hf", "modelscope", "aistudio", "paddlenlp")
BREAKS = [40_000] + [0] * 20  # once after some bytes, then as often as anyone tries
WEIGHTS = "model.safetensors"
NEEDLESS = {
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "README.md": b"# Tiny\n",
    "pytorch_model.bin": b"pickle",
    "sub/model.safetensors": b"another one",
}
each_hub = pytest.mark.parametrize("hub", HUB_NAMES)


@pytest.fixture
def content(tiny_folder) -> dict[str, bytes]:
    """A whole model, and what is of no use beside it."""
    return {path.name: path.read_bytes() for path in sorted(tiny_folder.iterdir())} | NEEDLESS


@pytest.fixture
def patience() -> float:
    """Seconds that a client waits for an answer: longer than the server takes on a machine that is busy."""
    return 10.0


@pytest.fixture
def server(content, tmp_path, monkeypatch, patience):
    """The state of a server that all hubs' clients are pointed at, their caches empty."""
    with serve(content) as (address, state):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        _point_huggingface(monkeypatch, address, tmp_path, patience)
        _point_modelscope(monkeypatch, address, tmp_path, patience)
        monkeypatch.setenv("STUDIO_GIT_HOST", address)
        monkeypatch.setenv("STUDIO_MODEL_API_URL_PREFIX", address)
        monkeypatch.setenv("AISTUDIO_ACCESS_TOKEN", "secret")
        monkeypatch.setattr("aistudio_sdk.requests.hub.CONNECTION_TIMEOUT", patience)
        monkeypatch.setenv("COMMUNITY_MODEL_PREFIX", f"{address}/community")
        monkeypatch.setattr(store, "TIMEOUT", (patience, patience))
        for module in (store, huggingface):
            monkeypatch.setattr(module, "WAIT", 0.0)
        monkeypatch.setattr(store, "TRIES", 2)
        monkeypatch.setattr(store, "_CHUNK", 8192)
        fetch.cache_clear()
        yield state
        fetch.cache_clear()


def _point_huggingface(monkeypatch, address: str, tmp_path: Path, patience: float) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", patience)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", patience)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 8192)
    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    monkeypatch.setattr(huggingface, "_TIMEOUT", patience)


def _point_modelscope(monkeypatch, address: str, tmp_path: Path, patience: float) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope-home"))
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_INTRA_CLOUD", "0")
    modelscope_hub.config.set_default_config(None)
    for name, value in (("DOWNLOAD_RETRY_TIMES", 3), ("DOWNLOAD_RETRY_MAX_DELAY_SECONDS", 0)):
        monkeypatch.setattr(f"modelscope_hub._download.{name}", value)
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
    monkeypatch.setattr("modelscope_hub._legacy_api.DOWNLOAD_TIMEOUT", patience)
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_TIMEOUT_SECONDS", patience)
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)


def get(hub: str) -> Path:
    """The model's folder, as a new process would find it."""
    fetch.cache_clear()
    return resolve_model(f"{hub}:{REPO}").folder


def refused(hub: str, kind: type[FinetuneError]) -> str:
    with pytest.raises(FinetuneError) as caught:
        get(hub)
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


def assert_whole(folder: Path, content: dict[str, bytes]) -> None:
    """Just the files that are needed, each as it is on the hub."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {name: data for name, data in content.items() if name not in NEEDLESS}


def assert_nothing(hub: str, server) -> None:
    """No weights that could be taken for whole, wherever the client keeps them."""
    repo = Repo(hub, REPO, None, "model")
    sizes = {path.stat().st_size for path in HUBS[hub].root(repo).rglob("*") if path.is_file() and not _is_part(path)}
    assert len(server.files[WEIGHTS]) not in sizes


def _is_part(path: Path) -> bool:
    return path.name.endswith(".incomplete")


@each_hub
def test_what_is_needed_is_fetched_once(hub, server, content):
    assert_whole(get(hub), content)
    assert not set(server.fetched()) & NEEDLESS.keys()
    first = len(server.fetched())
    assert_whole(get(hub), content)
    assert len(server.fetched()) == first


@each_hub
def test_a_broken_download_goes_on_where_it_stopped(hub, server, content):
    server.cut = list(BREAKS)
    message = refused(hub, HubError)
    assert "broke off" in message and "goes on where it stopped" in message
    assert_nothing(hub, server)
    server.cut = []
    server.sent.clear()
    assert_whole(get(hub), content)
    starts = [int(asked.removeprefix("bytes=").split("-")[0]) for asked in server.ranges()]
    assert starts and min(starts) >= 32_768
    assert server.fetched().count(WEIGHTS) == 1


@each_hub
def test_a_connection_that_breaks_now_and_then_is_no_error(hub, server, content):
    server.cut = [40_000, 30_000]
    assert_whole(get(hub), content)
    assert len(server.ranges()) == 2


@pytest.mark.parametrize(
    "status, words", [(401, "(401)"), (403, "(403)"), (404, "(404)"), (429, "(429)"), (503, "error 503")]
)
@each_hub
def test_a_hub_that_refuses(hub, status, words, server):
    server.refuse = status
    message = refused(hub, CheckpointError if status < 429 else HubError)
    assert words in message and f"{hub}:{REPO}" in message and HUBS[hub].title in message
    if status == 429 and hub != "aistudio":  # whose SDK keeps the header to itself
        assert "in 7 seconds" in message
    if status in (401, 403) and HUBS[hub].token:
        assert HUBS[hub].token in message


@pytest.mark.parametrize("status", [401, 403])
@each_hub
def test_a_hub_that_shows_a_model_and_keeps_its_files(hub, status, server):
    server.refuse_files = status
    assert f"({status})" in refused(hub, CheckpointError)
    assert_nothing(hub, server)


@pytest.mark.parametrize("patience", [0.3])
@pytest.mark.parametrize("silent", ["listing", "files"])
@each_hub
def test_a_hub_that_does_not_answer(hub, silent, server):
    server.silent = silent
    assert "did not answer in time" in refused(hub, HubError)
    assert_nothing(hub, server)


@each_hub
def test_a_file_that_is_not_what_the_hub_says_is_not_kept(hub, server, content):
    server.damaged = True
    message = refused(hub, HubError)
    assert f"{WEIGHTS} arrived damaged" in message and "removed" in message
    assert_nothing(hub, server)
    server.damaged = False
    assert_whole(get(hub), content)


@each_hub
def test_room_is_looked_for_before_the_first_byte(hub, server, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = refused(hub, StorageError)
    assert "1,000 bytes are free" in message and HUBS[hub].cache in message
    assert not [name for name in server.fetched() if name == WEIGHTS]


@each_hub
def test_a_disk_that_fills_meanwhile(hub, server, content):
    repo = parse_repo(f"{hub}:{REPO}", "model")
    weights = next(file for file in HUBS[hub].listing(repo).files if file.name == WEIGHTS)
    partial = next(path for path in HUBS[hub].places(repo, weights) if _is_part(path))
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")  # the kernel's own "no space left on device"
    message = refused(hub, StorageError)
    assert "No space left on device" in message and HUBS[hub].cache in message
    partial.unlink(missing_ok=True)
    assert_nothing(hub, server)
    assert_whole(get(hub), content)


@each_hub
def test_offline(hub, server, content, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(hub, CheckpointError)
    assert "not in the hub cache" in message and "HF_HUB_OFFLINE" in message
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = get(hub)
    server.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get(hub) == folder
    assert_whole(folder, content)
    assert not server.asked


@each_hub
def test_a_part_is_not_taken_for_whole_offline(hub, server, monkeypatch):
    server.cut = list(BREAKS)
    refused(hub, HubError)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(hub, CheckpointError)
    assert "not in the hub cache" in message or "no weights" in message or "holds no model" in message


@each_hub
def test_a_file_that_went_missing_is_fetched_again(hub, server, content, monkeypatch):
    (get(hub) / WEIGHTS).resolve().unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError):
        get(hub)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert_whole(get(hub), content)


@each_hub
def test_what_is_cached_does_where_the_hub_is_down_but_not_where_it_refuses(hub, server, content, capsys):
    get(hub)
    server.refuse = 503
    assert_whole(get(hub), content)
    assert "is used as it was fetched before" in capsys.readouterr().err.replace("\n", " ")
    server.refuse = 403
    assert "(403)" in refused(hub, CheckpointError)


@each_hub
def test_a_model_that_changed_is_fetched_anew(hub, server, content):
    get(hub)
    weights = bytearray(server.files[WEIGHTS])
    weights[-1] ^= 1
    server.files[WEIGHTS] = bytes(weights)
    if hub == "hf":
        server.commit = COMMIT[::-1]
    assert_whole(get(hub), content | {WEIGHTS: bytes(weights)})


@each_hub
def test_revisions(hub, server, content):
    name = f"{hub}:{REPO}@v1"
    if hub == "paddlenlp":
        with pytest.raises(CheckpointError, match="has no revisions.*Leave @v1 out"):
            resolve_model(name)
        return
    assert_whole(resolve_model(name).folder, content)
    assert any("v1" in path for _, path in server.asked)
    with pytest.raises(CheckpointError, match="no revision 'v2'"):
        resolve_model(f"{hub}:{REPO}@v2")


def test_weights_in_shards_from_the_community_files(server, tiny_untied_folder):
    server.files = {path.name: path.read_bytes() for path in tiny_untied_folder.iterdir()}
    assert WEIGHTS not in server.files
    assert_whole(get("paddlenlp"), server.files)


def test_the_community_files_are_where_paddlenlp_says(monkeypatch):
    monkeypatch.delenv("COMMUNITY_MODEL_PREFIX", raising=False)
    from paddlenlp.utils import downloader

    from finetune.model.hubs.paddlenlp import _prefix

    assert _prefix() == downloader.COMMUNITY_MODEL_PREFIX
    assert downloader.COMMUNITY_MODEL_PREFIX.startswith("https://")


def test_prefixes_and_the_default_hub(server, content, monkeypatch):
    assert parse_repo("a/b@x/y", "model") == Repo("hf", "a/b", "x/y", "model")
    assert parse_repo("./a", "model") is parse_repo("/a/b", "model") is parse_repo("a/b/c", "model") is None
    with pytest.raises(CheckpointError, match="there is no hub 'modelscop'. Did you mean modelscope."):
        resolve_model(f"modelscop:{REPO}")
    monkeypatch.setenv("FINETUNE_HUB", "paddlenlp")
    source = resolve_model(REPO)
    assert_whole(source.folder, content)
    assert "cache/hubs/paddlenlp" in str(source.folder)
    assert source.hub_or_folder == f"paddlenlp:{REPO}"
    monkeypatch.setenv("FINETUNE_HUB", "nowhere")
    with pytest.raises(CheckpointError, match="FINETUNE_HUB: there is no hub 'nowhere'"):
        resolve_model(REPO)


def test_an_adapter_names_its_base_as_peft_does(server, tmp_path, content):
    from finetune.model.adapter_config import peft_config
    from finetune.model.adapters import LoraSettings
    from tests.model.test_resolve import adapter

    base = resolve_model(f"hf:{REPO}@v1")
    config = peft_config(LoraSettings(), base.hub_or_folder, ["q_proj"])
    assert (config["base_model_name_or_path"], config["revision"]) == (REPO, "v1")
    folder = adapter(tmp_path / "a", REPO, revision="v1")
    assert resolve_model(folder).base.name == f"{REPO}@v1"
    assert_whole(resolve_model(folder).base.folder, content)


def test_commands_take_hub_ids(server, tmp_path, content, capsys):
    assert finetune("export", f"aistudio:{REPO}", tmp_path / "out") == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == content[WEIGHTS]
    assert "fetch Qwen/Tiny 1/1" in capsys.readouterr().err
    server.refuse = 404
    fetch.cache_clear()
    assert finetune("export", f"modelscope:{REPO}", tmp_path / "other") == 2
    assert capsys.readouterr().err.startswith(f"error: modelscope:{REPO}: there is neither such a folder")


@pytest.mark.parametrize("hub", ["modelscope", "aistudio"])
def test_rows_of_a_hub(hub, server, monkeypatch):

    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    line = (json.dumps(row) + "\n").encode()
    server.files = {"README.md": b"#", "data/train.jsonl": line * 2, "data/test.jsonl": line, "x.bin": b"x"}
    rows = list(read_rows(From(f"{hub}:{REPO}")))
    assert [name for _, name in rows] == [f"{hub}:{REPO}/data/train.jsonl:{number}" for number in (1, 2)]
    assert rows[0][0] == row
    [file] = find_files(From(f"{hub}:{REPO}@v1", split="test"))
    assert file.name == f"{hub}:{REPO}@v1/data/test.jsonl" and file.sha256()
    assert "x.bin" not in server.fetched()
    server.refuse = 404
    with pytest.raises(DataError, match="404"):
        find_files(From(f"{hub}:{REPO}@v3"))


def test_a_hub_without_datasets_says_so(server):

    with pytest.raises(DataError, match="has no datasets that can be fetched.*hf:Qwen/Tiny"):
        find_files(From(f"paddlenlp:{REPO}"))


def test_without_the_library_of_modelscope(server, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "modelscope_hub", None)
    assert "pip install 'paddle-finetune[modelscope]'" in refused("modelscope", CheckpointError)
