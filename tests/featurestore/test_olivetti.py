"""The Olivetti faces, fetched from a server of the tests' own."""

import hashlib
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from featurestore.demo.olivetti import fetch_olivetti
from featurestore.errors import FeatureStoreError
from tests.commands import command

olivetti = pytest.importorskip("sklearn.datasets._olivetti_faces", reason="scikit-learn is not installed")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Noise of the form of the real file, (400, 64, 64) uint8, where scikit-learn looks for it."""
    images = np.random.default_rng(0).integers(0, 256, (400, 64, 64), dtype=np.uint8)
    images[0, 0, :2] = 0, 255  # the darkest and the brightest there is, as the originals have
    content = io.BytesIO()
    savemat(content, {"faces": images.transpose(0, 2, 1).reshape(400, 4096).T})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content.getvalue())))
            self.end_headers()
            self.wfile.write(content.getvalue())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/olivettifaces.mat"
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    monkeypatch.setattr(olivetti, "FACES", olivetti.FACES._replace(url=url, checksum=digest))
    yield images
    server.shutdown()


def test_each_photograph_is_a_file_of_its_person(served: np.ndarray, tmp_path: Path) -> None:
    fetch_olivetti(tmp_path)
    assert len(list(tmp_path.glob("s*/*.png"))) == 400
    for i in (0, 9, 10, 399):
        read = cv2.imread(str(tmp_path / f"s{i // 10 + 1}" / f"{i % 10 + 1}.png"), cv2.IMREAD_GRAYSCALE)
        assert (read == served[i]).all()


def test_what_is_there_is_not_fetched_again(
    served: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_olivetti(tmp_path)
    monkeypatch.setattr(olivetti, "FACES", olivetti.FACES._replace(url="http://127.0.0.1:1/nothing"))
    fetch_olivetti(tmp_path)


def test_a_file_that_was_changed_on_the_way_is_refused(
    served: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(olivetti, "FACES", olivetti.FACES._replace(checksum="0" * 64))
    with pytest.raises(FeatureStoreError, match="could not be fetched"):
        fetch_olivetti(tmp_path)
    assert not list(tmp_path.glob("s*"))


def test_without_a_network_the_command_says_what_else_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    done = command("fetch_olivetti", "--out", tmp_path / "faces")
    assert done.returncode == 1
    assert "photographs of your own" in done.stderr
