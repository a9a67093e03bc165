"""Videos over http, from a server in a thread that can be unwell."""

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.storage import StorageError
from pipeline import web
from pipeline.decode import MediaError
from pipeline.discover import DiscoverConfig, discover
from pipeline.media import fetched

ASKED: Counter[str] = Counter()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """`/STATUS/TIMES/...`: answers with the status that often, and then with the path; `cut` promises more than it sends."""
        ASKED[self.path] += 1
        _, status, times, *_ = self.path.split("/")
        data = self.path.encode()
        if ASKED[self.path] > int(times):
            status = "200"
        self.send_response(200 if status == "cut" else int(status))
        self.send_header("Content-Length", str(len(data) + (5 if status == "cut" else 0)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Tests say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    ASKED.clear()
    running = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


def test_addresses_are_read_as_they_stand(server: str) -> None:
    path = "/200/0/a%20b.mp4?sign=x%2Fy&z=1"
    assert web.read(server + path) == path.encode() and dict(ASKED) == {path: 1}


@pytest.mark.parametrize("status", ["503", "429", "cut"])
def test_an_unwell_server_is_asked_again(server: str, status: str) -> None:
    path = f"/{status}/2/x.mp4"
    assert web.read(server + path, pause_seconds=0.001) == path.encode() and ASKED[path] == 3
    with pytest.raises(StorageError, match="not read after 5 tries"):
        web.read(f"{server}/{status}/9/x.mp4", pause_seconds=0.001)


def test_what_is_not_there_or_refused_is_not_asked_for_again(server: str) -> None:
    with pytest.raises(FileNotFoundError):
        web.read(f"{server}/404/9/x.mp4")
    with pytest.raises(StorageError, match="403"):
        web.read(f"{server}/403/9/x.mp4")
    assert set(ASKED.values()) == {1}


def test_a_table_of_addresses(server: str, tmp_path: Path) -> None:
    urls = [f"{server}/200/0/a%20b.mp4?x=1", f"{server}/404/9/c.mp4"]
    pq.write_table(pa.table({"url": urls, "label": ["dog", None]}), tmp_path / "clips.parquet")
    found, gone = discover(DiscoverConfig(str(tmp_path / "clips.parquet")))
    assert [(clip.key, clip.source, clip.label, clip.reason) for clip in (found, gone)] == [("a_b", urls[0], "dog", None), ("c", urls[1], None, None)]
    assert not ASKED and fetched(found) == b"/200/0/a%20b.mp4?x=1"
    with pytest.raises(MediaError) as error:
        fetched(gone)
    assert error.value.reason == "missing"
    # The same table of files that were fetched by other means.
    (tmp_path / "in").mkdir()
    (tmp_path / "in/c.mp4").write_bytes(b"x")
    listed = discover(DiscoverConfig(str(tmp_path / "in"), listing=str(tmp_path / "clips.parquet")))
    assert [(clip.key, clip.reason) for clip in listed] == [("a_b", "missing"), ("c", None)]


def test_pages_are_no_videos(tmp_path: Path) -> None:
    (tmp_path / "urls.csv").write_text("url\nhttps://www.youtube.com/watch?v=---g-f_I2yQ\n")
    with pytest.raises(ValueError, match="no video's address"):
        discover(DiscoverConfig(str(tmp_path / "urls.csv")))
