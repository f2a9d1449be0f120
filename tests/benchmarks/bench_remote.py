"""Measure rows of a store on an object store beside one answer with the same bytes, and beside a store on this disk.

python -m tests.benchmarks.bench_remote                  # everything, about 5 minutes and 3 GB of disk
python -m tests.benchmarks.bench_remote --only gather    # one section

The object store is on loopback, so what is measured is what the program adds, not a network. moto's S3 needs longer for a range
the larger the object is, so rows are also read from a web server in processes of its own: nginx where it is installed, since one
answer takes Python longer than the program takes for it; else Tornado's.
"""

import asyncio
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from featurestore import FeatureStore
from featurestore.remote.client import ObjectStore
from featurestore.remote.mirror import put_file
from heads.features import Features
from heads.registry import draw_head
from heads.train import Examples, Settings, train_epoch
from tests.benchmarks.measure import Line, compare, fill_store, rate, run_sections, section_options
from tests.object_servers import KEYS, in_process, request, s3_server

LAYER, SHAPE, SLOTS, ROWS = "fc7-relu", (4096,), 256, 1024
_ROW_BYTES = 4 * 4096


def _serve_files(root: Path, port: Any) -> None:
    async def serve() -> None:
        from tornado.httpserver import HTTPServer
        from tornado.netutil import bind_sockets
        from tornado.web import Application, StaticFileHandler

        logging.getLogger("tornado.access").setLevel(logging.CRITICAL)
        sockets = bind_sockets(0, "127.0.0.1", backlog=1024)
        HTTPServer(Application([("/(.*)", StaticFileHandler, {"path": str(root)})])).add_sockets(sockets)
        port.put(sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(serve())


_NGINX = """
worker_processes 2; daemon off; pid {own}/pid; error_log {own}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off; keepalive_requests 1000000;
    client_body_temp_path {own}; proxy_temp_path {own}; fastcgi_temp_path {own}; uwsgi_temp_path {own}; scgi_temp_path {own};
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def _wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"nginx does not answer at port {port}")


@contextmanager
def web_server(root: Path) -> Iterator[tuple[str, int]]:
    """The files below ``root`` on loopback; the server's name and port."""
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if nginx:
        with tempfile.TemporaryDirectory() as own, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            user = "user root;" if os.getuid() == 0 else ""  # its workers have to reach the folder
            Path(own, "nginx.conf").write_text(user + _NGINX.format(own=own, port=port, root=root))
            process = subprocess.Popen([nginx, "-c", f"{own}/nginx.conf"], stderr=subprocess.DEVNULL)
            try:
                _wait_for(port)
                yield "nginx", port
            finally:
                process.terminate()
                process.wait()
        return
    with in_process(_serve_files, root) as port:
        yield "Tornado", port


def gather_lines(server: str, url: str, flat: tuple[ObjectStore, str], n_items: int) -> list[Line]:
    """``ROWS`` rows by ranges, of a store that has no more or of a larger one, against one GET of as many bytes."""
    rows = FeatureStore.open(url).rows(LAYER)
    out = torch.empty(ROWS, *SHAPE)
    rng = np.random.default_rng(0)

    def ours() -> float:
        which = rng.permutation(n_items)[:ROWS]
        return rate(partial(rows.gather, which, out=out), ROWS * _ROW_BYTES / 1e9)

    def theirs() -> float:
        return rate(partial(flat[0].get, flat[1]), ROWS * _ROW_BYTES / 1e9)

    what = f"{ROWS:,} of {n_items:,} rows of {LAYER} from {server}, against one GET of the same bytes"
    return [compare(what, ours, theirs, 0.5, "GB/s")]


def gather(folder: Path) -> list[Line]:
    """Rows by byte ranges."""
    lines = []
    (folder / "flat").write_bytes(np.random.default_rng(1).bytes(ROWS * _ROW_BYTES))
    sizes = (ROWS, 4 * ROWS, 32 * ROWS)
    for n_items in sizes:
        fill_store(folder / f"{n_items}.zarr", n_items, SHAPE, SLOTS, LAYER)
    with web_server(folder) as (server, port):
        web = f"http://127.0.0.1:{port}"
        for n_items in sizes:
            lines += gather_lines(server, f"{web}/{n_items}.zarr", (ObjectStore(web), "flat"), n_items)
    with s3_server() as port:
        os.environ.update({**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
        request(port, "PUT", "/bucket")
        objects = ObjectStore("s3://bucket")
        put_file(objects, "flat", folder / "flat")
        for path in (folder / f"{ROWS}.zarr").rglob("*"):
            if path.is_file():
                put_file(objects, path.relative_to(folder).as_posix(), path)
        lines += gather_lines("moto's S3", f"s3://bucket/{ROWS}.zarr", (objects, "flat"), ROWS)
    return lines


def cache(folder: Path) -> list[Line]:
    """Rows from shards that are in the cache, and an epoch of training from them, against a store on this disk."""
    n_items = 8 * ROWS
    fill_store(folder / "s.zarr", n_items, SHAPE, SLOTS, LAYER, fresh=True)
    with web_server(folder) as (_, port):
        local = FeatureStore.open(folder / "s.zarr").rows(LAYER)
        remote = FeatureStore.open(f"http://127.0.0.1:{port}/s.zarr", cache=folder / "cache").rows(LAYER)
        remote.gather(range(n_items))
        out, rng = torch.empty(ROWS, *SHAPE), np.random.default_rng(0)

        def gathered(rows: Any) -> float:
            which = torch.from_numpy(rng.permutation(n_items)[:ROWS])
            return rate(partial(rows.gather, which, out=out), ROWS * _ROW_BYTES / 1e9, times=20)

        what = f"{ROWS:,} of {n_items:,} rows of {LAYER} from a warm cache, against the disk (in memory)"
        lines = [compare(what, partial(gathered, remote), partial(gathered, local), 1 / 1.1, "GB/s", 9)]
        settings, none = Settings(), np.empty(0, np.int64)
        items = rng.permutation(n_items)[: n_items // 3 * 3].reshape(-1, 3)
        examples = Examples(items, rng.integers(0, 3, len(items)), np.arange(len(items)), none, none)

        def epoch(rows: Any) -> float:
            head = draw_head("similarity", SHAPE, 0)
            head.standardise(torch.zeros(int(np.prod(SHAPE))), 1.0)
            optimizer = torch.optim.Adam(head.parameters(), lr=5e-4, fused=True)
            return train_epoch(head, Features([rows]), examples, settings, optimizer, 1).examples_per_second

        what = f"an epoch of a similarity head on {LAYER} from a warm cache, against the disk"
        return [*lines, compare(what, partial(epoch, remote), partial(epoch, local), 0.95, "triplets/s", 9)]


SECTIONS: dict[str, Callable[[Path], list[Line]]] = {"gather": gather, "cache": cache}


@click.command()
@section_options(SECTIONS)
def main(only: tuple[str, ...], markdown: bool) -> None:
    """Compare rows of a store at a URL with plain transfers and with a store on this disk; nothing is asserted."""
    run_sections(SECTIONS, only, markdown)


if __name__ == "__main__":
    main()
