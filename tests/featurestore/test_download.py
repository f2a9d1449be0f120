"""Published files from a real server on this machine: resumed, checked, unpacked, refused."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from featurestore import FeatureStore
from featurestore.checkpoints import download
from featurestore.checkpoints.download import fetch, published_file
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import BACKBONES, get_backbone
from featurestore.networks.spec import PublishedFile
from pipelines.cache_layers import main as cache_layers
from tests.commands import command

CONTENT = np.random.default_rng(0).bytes(3 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content``, whole or in part, and notes each request's Range. ``breaks_after`` bytes it hangs up."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag = '"one"'
        self.breaks_after: int | None = None
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers["Range"]
        server.ranges.append(asked)
        start = 0
        if asked and self.headers["If-Range"] == server.etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start : server.breaks_after])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_file_comes_once_with_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    published = PublishedFile(server.url, SHA256)
    path = fetch(published, tmp_path / "weights", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert fetch(published, tmp_path / "weights") == path
    assert len(server.ranges) == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["file.bin", "file.bin.lock"]


def test_a_download_that_broke_off_goes_on(server: Server, tmp_path: Path) -> None:
    published = PublishedFile(server.url, SHA256)
    server.breaks_after = 1 << 20
    with pytest.raises(FeatureStoreError, match=r"interrupted.*1048576 bytes are kept"):
        fetch(published, tmp_path)
    server.breaks_after = None
    first: list[int] = []
    path = fetch(published, tmp_path, lambda done, total: first.append(done))
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1048576-"]
    assert first[0] == 1 << 20


@pytest.mark.parametrize("etag", ['"two"', ""])
def test_another_file_under_the_same_name_is_not_mixed_in(server: Server, tmp_path: Path, etag: str) -> None:
    """Without a published checksum nothing else would notice two halves of different files."""
    published = PublishedFile(server.url)
    server.breaks_after = 1 << 20
    if not etag:
        server.etag = ""  # a server that cannot say which file it was
    with pytest.raises(FeatureStoreError):
        fetch(published, tmp_path)
    server.breaks_after, server.etag, server.content = None, etag, CONTENT[::-1]
    assert fetch(published, tmp_path).read_bytes() == CONTENT[::-1]


def test_a_server_that_passes_over_if_range(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.breaks_after = 1 << 20
    with pytest.raises(FeatureStoreError):
        fetch(PublishedFile(server.url), tmp_path)
    server.breaks_after, server.content, server.etag = None, CONTENT[::-1], '"two"'
    original = Handler.do_GET

    def careless(self: Handler) -> None:
        if self.headers["Range"]:
            self.headers.replace_header("If-Range", server.etag)
        original(self)

    monkeypatch.setattr(Handler, "do_GET", careless)
    with pytest.raises(FeatureStoreError, match="has changed since its first part was downloaded"):
        fetch(PublishedFile(server.url), tmp_path)
    assert fetch(PublishedFile(server.url), tmp_path).read_bytes() == CONTENT[::-1]


def test_a_check_that_was_interrupted_is_made_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "sha256_of", interrupted)
        fetch(PublishedFile(server.url, "0" * 64), tmp_path)
    with pytest.raises(FeatureStoreError, match="has the sha256"):
        fetch(PublishedFile(server.url, "0" * 64), tmp_path)


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(FeatureStoreError, match=r"has the sha256 .* as published: it was changed"):
        fetch(PublishedFile(server.url, SHA256[:8]), tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def test_one_file_out_of_an_archive(server: Server, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in (("../escaped", b"no"), ("vgg_face_torch/VGG_FACE.t7", CONTENT)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    server.content = packed.getvalue()
    path = fetch(PublishedFile(server.url, member="VGG_FACE.t7"), tmp_path / "weights")
    assert path.name == "VGG_FACE.t7"
    assert path.read_bytes() == CONTENT
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["VGG_FACE.t7", "file.bin.lock"]
    server.content = packed.getvalue()[:1000]
    with pytest.raises(FeatureStoreError, match="cannot be unpacked"):
        fetch(PublishedFile(server.url, member="VGG_FACE.t7"), tmp_path / "cut")
    changed = bytearray(packed.getvalue())
    changed[len(changed) // 2] ^= 1  # gzip's checksum stands at the end, where unpacking one member does not look
    server.content = bytes(changed)
    with pytest.raises(FeatureStoreError, match="cannot be unpacked"):
        fetch(PublishedFile(server.url, member="VGG_FACE.t7"), tmp_path / "changed")


def test_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match=r"cannot be reached.*give `weights` FILE"):
        fetch(PublishedFile("http://127.0.0.1:9/file.bin"), tmp_path)


def test_a_page_that_is_gone(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    with pytest.raises(FeatureStoreError, match="answers 404"):
        fetch(PublishedFile(server.url), tmp_path)


def test_what_is_published() -> None:
    assert published_file(get_backbone("vggface")).member == "VGG_FACE.t7"
    assert published_file(get_backbone("inception_resnet_v1"), "casia-webface").url.endswith("casia-webface.pt")
    assert published_file(get_backbone("torchvision:convnext_tiny")).sha256 == "983f1562"
    with pytest.raises(FeatureStoreError, match=r"no download .casia-webfase.. Did you mean casia-webface"):
        published_file(get_backbone("inception_resnet_v1"), "casia-webfase")
    for name in ("resnet50_ft", "senet50_scratch"):
        with pytest.raises(FeatureStoreError, match=f"Google Drive.*`weights` {name}_weight.pkl"):
            published_file(get_backbone(name))
    assert all("non-commercial" in spec.licence or "public domain" in spec.licence for spec in BACKBONES.values())


def test_the_command_fetches_and_caches(
    server: Server, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = get_backbone("torchvision:squeezenet1_1").build().state_dict()
    torch.save(state, tmp_path / "published.pth")
    server.content = (tmp_path / "published.pth").read_bytes()
    monkeypatch.setattr(download, "published_file", lambda spec, which: PublishedFile(server.url))
    monkeypatch.setenv("FEATURESTORE_WEIGHTS", str(tmp_path / "weights"))
    arguments = ["--layers", "features.1", "--images", photographs, "--store", tmp_path / "s.zarr"]
    arguments = [*map(str, arguments), "--backbone", "torchvision:squeezenet1_1", "--weights", "download"]
    planned = CliRunner().invoke(cache_layers, [*arguments, "--dry-run"])
    assert planned.exit_code == 1
    assert "Leave --dry-run out to fetch them" in planned.output
    assert not (tmp_path / "weights").exists()
    done = CliRunner().invoke(cache_layers, arguments)
    assert done.exit_code == 0, done.output
    assert "SqueezeNet1_1_Weights.IMAGENET1K_V1" in done.output  # whose licence it is, before anything is fetched
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    assert source.attributes["weights"] == hashlib.sha256(server.content).hexdigest()
    again = CliRunner().invoke(cache_layers, [*arguments, "--dry-run"])
    assert "everything is cached" in again.output
    assert len(server.ranges) == 1


def test_the_command_says_where_else_to_look(tmp_path: Path, photographs: Path) -> None:
    arguments = (
        "--layers",
        "descriptor",
        "--images",
        photographs,
        "--backbone",
        "resnet50_ft",
        "--weights",
        "download",
    )
    done = command("cache_layers", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "Google Drive" in done.stderr
    assert "Traceback" not in done.stderr
