"""A link to a server with a latency for each request, a bandwidth for each connection, and outages: a process of its own that copies bytes.

`python -m tests.link HOST:PORT LATENCY_SECONDS BYTES_PER_SECOND` prints the port on 127.0.0.1 that it listens on, obeys `up`, `down` (connections are
cut, and refused) and `silent` (nothing passes) on its input, and ends with it.
"""

import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

CHUNK_BYTES = 128 << 10


@dataclass
class Link:
    """A running link. `state` is what to write to change it."""

    address: str
    """host:port of this end."""
    process: subprocess.Popen

    def set(self, state: str) -> None:
        """`up`, `down` or `silent`; it is so when this returns."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{state}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == f"{state}\n"


@contextmanager
def linked(address: str, *, latency_seconds: float = 0.05, bytes_per_second: float = 60e6) -> Iterator[Link]:
    """A link to host:port."""
    command = [sys.executable, "-m", "tests.link", address, str(latency_seconds), str(bytes_per_second)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield Link(f"127.0.0.1:{int(process.stdout.readline())}", process)
        finally:
            process.stdin.close()
            process.wait()


class Connections:
    """Those that are open, and whether anything passes."""

    def __init__(self, latency_seconds: float, bytes_per_second: float) -> None:
        self._latency, self._rate, self._state, self._open = latency_seconds, bytes_per_second, "up", set[socket.socket]()
        self._passes = threading.Event()
        self._passes.set()

    def set(self, state: str) -> None:
        """See `Link.set`."""
        self._state = state
        (self._passes.clear if state == "silent" else self._passes.set)()
        if state == "down":
            for each in list(self._open):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def serve(self, client: socket.socket, address: tuple[str, int]) -> None:
        """Copies both ways until one side ends."""
        if self._state == "down":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            return
        with suppress(OSError), client, socket.create_connection(address) as server:
            self._open |= {client, server}
            answered = threading.Event()
            answered.set()
            back = threading.Thread(target=self._copy, args=(server, client, self._answer(answered)), daemon=True)
            back.start()
            self._copy(client, server, self._request(answered))
            back.join()
            self._open -= {client, server}

    def _copy(self, source: socket.socket, target: socket.socket, wait: Callable[[int], None]) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                wait(len(data))
                self._passes.wait()
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _request(self, answered: threading.Event) -> Callable[[int], None]:
        """Waits before the first bytes that follow an answer."""

        def wait(_size: int) -> None:
            if answered.is_set():
                answered.clear()
                time.sleep(self._latency)

        return wait

    def _answer(self, answered: threading.Event) -> Callable[[int], None]:
        """Waits as long as the bytes take."""
        free = 0.0

        def wait(size: int) -> None:
            nonlocal free
            answered.set()
            free = max(free, time.monotonic()) + size / self._rate
            time.sleep(max(0.0, free - time.monotonic()))

        return wait


def main(address: str, latency_seconds: str, bytes_per_second: str) -> None:
    """Serves until its input ends."""
    host, _, port = address.rpartition(":")
    connections = Connections(float(latency_seconds), float(bytes_per_second))
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    def accept() -> None:
        while True:
            client = listener.accept()[0]
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=connections.serve, args=(client, (host, int(port))), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    for line in sys.stdin:
        connections.set(line.strip())
        print(line, end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
