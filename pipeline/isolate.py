"""Native decoding in a process of its own: a clip that crashes, hangs or eats all memory costs itself, not the worker that was given it.

A `Child` is another Python that imports what decoding needs (PyAV and numpy; no torch, no Ray) and calls top-level functions that it is sent by name.
Requests and small results are pickles on a socket. Large arrays stay where the child put them, in memory that both processes map. When the last array
on it is gone it is used again for a later result; it belongs to no file system, so that nothing is left behind when a process dies. Pictures are
decoded straight into such memory (`pipeline.decode.decode_into`), so that isolating them costs no copy.
`stream` does the same with what a generator yields, one item at a time and a couple ahead: a film passes through in bounded memory.

The boundary is one of faults, not of trust: a decoder that an attacker has taken over could send a pickle of its choice.
Knows no Ray; works in Ray's workers, because the child is executed, not forked. Linux only (memfd, RLIMIT_AS, PDEATHSIG).
"""

import contextlib
import ctypes
import errno
import faulthandler
import math
import mmap
import os
import pickle
import queue
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pipeline.decode import MediaError, decode_into

ATTEMPTS = 3
"""Processes that a call may cost before its clip is blamed for what may have come from outside."""
START_SECONDS = 120.0
"""A child that has not imported what it needs by then, from a slow network file system too, will not."""
POLL_SECONDS = 1.0
"""A wait is counted in pieces of this size; between them, the child's memory is looked at."""
HEADROOM_BYTES = 1 << 30
"""Address space beyond a clip's limit. Libraries answer a failed allocation with anything from a wrong reason to a damaged picture, so the limit
itself must not make one fail; whether a clip went beyond it is seen afterwards. FFmpeg's largest single allocations, pictures, are this big."""
SHARED_BYTES = 1 << 20
"""Arrays from this size on travel through shared memory."""
SPARE_BYTES = 256 << 20
"""Shared memory that is kept for later results: three clips of 10 s at 256 pixels."""
MAX_SHARED = 200
"""Arrays of one result that may have new shared memory: the kernel passes 253 descriptors with a message."""
INLINE_BYTES = 64 << 10
"""The largest message that goes through the socket itself."""
STDERR_BYTES = 16384
"""What is kept of a child's last words."""
WORDS_CHARACTERS = 600
"""What of them goes into a message."""
AHEAD = 2
"""Items of a stream that wait for their taker; the child makes no more before one of them is taken."""
STOP_SECONDS = 10.0
"""How long a killed process may take to end, and a stream that is closed early to come to its next item."""
PR_SET_PDEATHSIG = 1
SIGNALS = {number.value: number.name for number in signal.Signals}

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What decoding or encoding one clip may cost."""

    clip_seconds: float = 300.0
    """Wall-clock seconds after which a clip counts as hanging and is given up with the reason `timeout`. Re-encoding 10 s of 720p takes 4.
    Of a film whose pictures come in pieces, the seconds for each piece."""
    clip_memory_mb: int = 2048
    """Address space in MiB that one clip may add to the process that works on it, the result included; beyond it the reason is `out_of_memory`.
    It may have taken 1024 more when that is noticed. Re-encoding takes 80 for 720p, 280 for 8K; decoding 9 a second at 256 x 454 pixels."""

    def __post_init__(self) -> None:
        if self.clip_seconds <= 0:
            raise ValueError(f"clip_seconds is {self.clip_seconds:g}; expected more than 0")
        if self.clip_memory_mb < 1:
            raise ValueError(f"clip_memory_mb is {self.clip_memory_mb}; expected at least 1")


def call(function: Callable[..., T], *arguments: Any, limits: Limits) -> T:
    """`function(*arguments)` in one of this process's children, as many as there are calls at the same time. See `Child.call`.

    They stay for later calls, whichever thread makes them: the threads that decode come and go faster than a child starts.
    """
    with _lent_child(limits) as child:
        return child.call(function, *arguments)


def stream(function: Callable[..., Iterable[T]], *arguments: Any, limits: Limits) -> Generator[T]:
    """The items of `function(*arguments)`, a generator that runs in one of this process's children. See `Child.stream`.

    Closing it before its end, or letting go of it, ends the generator there too.
    """
    with _lent_child(limits) as child:
        yield from child.stream(function, *arguments)


@contextlib.contextmanager
def _lent_child(limits: Limits) -> "Iterator[Child]":
    """One of this process's children that nobody uses, or a new one."""
    try:
        child = _idle.pop()
    except IndexError:
        child = Child(limits)
    child.limits = limits
    try:
        yield child
    finally:
        _idle.append(child)


_idle: "deque[Child]" = deque()


def peak_bytes() -> int:
    """The most memory that this process has held; not what `getrusage` says of children, which counts their parent's from before they began."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


class Child:
    """One process for native code, started on first use and again after each death. For one thread at a time."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._process: _Process | None = None
        self._streams = False
        self._was_fresh = False

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)`, computed in the child.

        The function must be importable by name, or a `functools.partial` of such a one; arguments, result and exceptions must be picklable. Its own
        exceptions come through as they are.
        Raises MediaError with the reason `timeout`, `out_of_memory` or `crashed` where the limits or the process ended the call. A clip is not blamed
        for what an earlier one did to the process, nor at once for a kill from outside: the call is repeated in a fresh process, so the function must
        not mind being called again. Raises RuntimeError if no process can be started.
        """
        for attempts_left in reversed(range(ATTEMPTS)):
            self._ask(function, arguments, streamed=False)
            if answer := self._answer(attempts_left):
                if answer.status == "raised":
                    raise answer.value
                return answer.value
        raise AssertionError

    def stream(self, function: Callable[..., Iterable[T]], *arguments: Any) -> Generator[T]:
        """The items of `function(*arguments)`, a generator computed in the child, as they are made; `AHEAD` of them wait for their taker.

        As `call`, with these differences. The time limit is for each item, and no time passes while nobody asks for one. The memory limit is for what
        the generator and the items on their way take; arrays that the caller still holds do not count. When a call would be repeated, so is the
        generator, and the items that had been taken before are dropped: it must yield the same again. An array is the caller's once it is yielded:
        the generator must not look at it afterwards. What it does or raises after the stream was closed is not heard of.
        """
        taken = 0
        try:
            for attempts_left in reversed(range(ATTEMPTS)):
                self._ask(function, arguments, streamed=True)
                made, self._streams = 0, True
                while answer := self._answer(attempts_left):
                    if answer.status != "item":
                        self._streams = False
                        if answer.status == "raised":
                            raise answer.value
                        return
                    made += 1
                    if made > taken:
                        taken = made
                        yield answer.value
                    del answer  # its memory is free before the next is asked for
                    assert self._process is not None
                    self._process.take_turn()
            raise AssertionError
        finally:
            self._end_stream()

    def _ask(self, function: Callable, arguments: Sequence, *, streamed: bool) -> None:
        assert getattr(function, "__module__", "") != "__main__", "a child cannot import functions from the main module"
        assert not self._streams, "one stream or call at a time"
        if self._process is None or self._process.owner != os.getpid():
            self._process = _Process()
        with self._closed_if_interrupted():
            self._process.ask(function, arguments, self.limits, streamed=streamed)

    def _answer(self, attempts_left: int) -> "_Answer | None":
        """What the process answers; None if it is to be asked again, in a fresh one."""
        assert self._process is not None
        try:
            with self._closed_if_interrupted():
                return self._process.answer(self.limits.clip_seconds)
        except _CallError as fault:
            if (fault.certain and (self._was_fresh or fault.reason == "timeout")) or not attempts_left:
                raise MediaError(fault.reason, fault.message) from None
            return None

    @contextlib.contextmanager
    def _closed_if_interrupted(self) -> Iterator[None]:
        """After a fault, or an interrupt, the child is in the middle of something that nobody waits for."""
        assert self._process is not None
        try:
            yield
        except BaseException:
            self._was_fresh = self._process.fresh
            self.close()
            raise

    def _end_stream(self) -> None:
        """Have the child close a generator that has not ended; if it does not come to that in time, end the child."""
        if self._streams and self._process is not None and self._process.owner == os.getpid() and self._process.stop.alive:
            with contextlib.suppress(_CallError), self._closed_if_interrupted():
                self._process.end_stream()
        self._streams = False

    def close(self) -> None:
        """End the process, if there is one; the next call starts another."""
        self._streams = False
        if self._process is not None:
            self._process.stop()
            self._process = None


class _CallError(Exception):
    """A call that the limits or the process ended; `certain` if nothing outside did it."""

    def __init__(self, reason: str, message: str, *, certain: bool = True) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message
        self.certain = certain


class _Process:
    """A running child, seen from its parent."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.calls = 0
        self.fresh = True
        """Whether what it does now is the first that it does."""
        self._words = bytearray()
        self._shared: dict[int, mmap.mmap] = {}
        self._idle: deque[int] = deque()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._popen = _start_from_lasting_thread(theirs.fileno())
        assert self._popen.stdout is not None
        self._stderr = self._popen.stdout.fileno()
        os.set_blocking(self._stderr, False)
        self.stop = weakref.finalize(self, _stop, self._popen, self._socket, self.owner)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(self._stderr, select.POLLIN)
        try:
            ready = self._wait(START_SECONDS)
        except TimeoutError:
            ready = None
        if ready is None:
            ending = self._ending()
            self.stop()
            raise RuntimeError(f"the process for native decoding did not start: it {ending}")

    def ask(self, function: Callable, arguments: Sequence, limits: Limits, *, streamed: bool) -> None:
        """Have the child begin with `function(*arguments)`."""
        self._limits, self._kills, self._size = limits, _oom_kills(), self._address_space("VmSize")
        self._most = self._size + (limits.clip_memory_mb << 20)
        self._words.clear()
        self.fresh, self.calls = self.calls == 0, self.calls + 1
        self._tell(_Request(function, arguments, self._most + HEADROOM_BYTES, self._no_longer_used(), streamed))

    def answer(self, seconds: float) -> "_Answer":
        """The child's next answer. Raises _CallError if it gives none in that time."""
        try:
            message = self._wait(seconds, self._most)
            if message is None:
                raise self._death(self._kills)
            reply: _Reply = pickle.loads(message[0])
            if reply.status == "memory":
                raise MemoryError
        except TimeoutError:
            raise _CallError("timeout", f"not done after clip_seconds={seconds:g}") from None
        except MemoryError:
            raise _CallError("out_of_memory", f"needs more than clip_memory_mb={self._limits.clip_memory_mb}") from None
        for number in reply.forgotten:
            self._shared.pop(number, None)
        return _Answer(reply.status, pickle.loads(reply.stream, buffers=[self._buffer(place, message[1]) for place in reply.places]))

    def take_turn(self) -> None:
        """Tell the child that an item was taken, and what of its memory may be used again."""
        idle = self._no_longer_used()
        held = sum(len(memory) for number, memory in self._shared.items() if number not in idle)
        # Never less than before: what is compared with it is the most that the child ever had.
        self._most = max(self._most, self._size + (self._limits.clip_memory_mb << 20) + held)
        self._tell(_Turn(self._most + HEADROOM_BYTES, idle, stop=False))

    def end_stream(self) -> None:
        """Have the child close its generator, and take what is still on its way."""
        self._tell(_Turn(self._most + HEADROOM_BYTES, [], stop=True))
        while self.answer(STOP_SECONDS).status == "item":
            pass

    def _tell(self, message: "_Request | _Turn") -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died; the wait for its answer will tell how
            _send(self._socket, pickle.dumps(message, 5))

    def _no_longer_used(self) -> list[int]:
        """Shared memory whose last array is gone."""
        return [self._idle.popleft() for _ in range(len(self._idle))]

    def _buffer(self, place: "_Place | bytearray", files: deque[int]) -> np.ndarray | bytearray:
        """An array's bytes, where the child put them."""
        if isinstance(place, bytearray):
            return place
        if place.new:
            file = files.popleft()
            self._shared[place.number] = mmap.mmap(file, place.capacity, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            os.close(file)
        if place.capacity > SPARE_BYTES:
            return np.frombuffer(self._shared.pop(place.number), np.uint8, place.size)
        array = np.frombuffer(self._shared[place.number], np.uint8, place.size)
        weakref.finalize(array, self._idle.append, place.number).atexit = False
        return array

    def _wait(self, seconds: float, most_bytes: int = sys.maxsize) -> tuple[bytes, deque[int]] | None:
        """The child's next message, or None if it ended instead. Raises TimeoutError, or MemoryError if it has grown beyond `most_bytes`.

        Time in which this process itself was stopped (a frozen node) is not held against the child.
        """
        waited = 0.0
        while waited < seconds:
            started = time.monotonic()
            ready = [file for file, _ in self._poll.poll(1000 * min(POLL_SECONDS, seconds - waited))]
            waited += min(time.monotonic() - started, 2 * POLL_SECONDS)
            if self._stderr in ready and self._listen() == b"":
                self._poll.unregister(self._stderr)  # it has closed its end
            answered = self._socket.fileno() in ready
            if (answered or not ready) and self._address_space("VmPeak") > most_bytes:
                raise MemoryError
            if answered:
                return _receive(self._socket)
            if not ready and self._popen.poll() is not None:  # and a process that it started still has its socket
                return None
        raise TimeoutError

    def _address_space(self, field: str) -> int:
        """Bytes that the child has (`VmSize`) or had at most (`VmPeak`); 0 when it is dead."""
        with contextlib.suppress(OSError), open(f"/proc/{self._popen.pid}/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":")), 0)
        return 0

    def _listen(self) -> bytes | None:
        """Take what the child has written to stderr, so that its pipe never fills, and keep the end. None if there is nothing, b"" after the last."""
        try:
            data = os.read(self._stderr, 1 << 16)
        except BlockingIOError:
            return None
        self._words += data
        del self._words[:-STDERR_BYTES]
        return data

    def _death(self, oom_kills: int) -> _CallError:
        """What the child died of."""
        ending = self._ending()
        if self._popen.returncode != -signal.SIGKILL:
            return _CallError("crashed", f"the process that worked on it {ending}")
        if _oom_kills() > oom_kills:
            return _CallError("out_of_memory", "the process that worked on it was killed by the kernel, which was out of memory")
        return _CallError("crashed", f"the process that worked on it {ending}", certain=False)

    def _ending(self) -> str:
        """How the child ended, with its last words; the same for every run, as far as they are."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(STOP_SECONDS)
        while self._listen():
            pass
        code = self._popen.returncode
        how = "does not answer" if code is None else f"ended with status {code}" if code >= 0 else f"died of {SIGNALS.get(-code, -code)}"
        words = last_words(self._words.decode(errors="replace"))
        return f"{how}: {words}" if words else how


def last_words(text: str) -> str:
    """The end of what a process wrote, in one line and without addresses, which differ from run to run; of a fatal error its innermost calls."""
    lines = [re.sub(r"0x[0-9a-fA-F]+", "0x..", line.strip()) for line in text.splitlines() if line.strip()]
    fatal = next((number for number, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
    chosen = lines[-5:] if fatal is None else [line for line in lines[fatal:] if line.startswith(("Fatal", "File"))][:5]
    return " | ".join(chosen)[-WORDS_CHARACTERS:]


def _oom_kills() -> int:
    """How often the kernel has killed for memory since it started, in any container; 0 where it does not say."""
    with contextlib.suppress(OSError), open("/proc/vmstat") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    return 0


# Starting and stopping


class _Starter(threading.Thread):
    """A thread that starts processes and lives as long as this one: PDEATHSIG kills a child when the *thread* that started it ends."""

    def __init__(self) -> None:
        super().__init__(name="isolate", daemon=True)
        self.owner = os.getpid()
        self.jobs: queue.SimpleQueue[tuple[Callable[[], subprocess.Popen[bytes]], Future[subprocess.Popen[bytes]]]] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            job, future = self.jobs.get()
            try:
                future.set_result(job())
            except OSError as error:
                future.set_exception(error)


_starter: _Starter | None = None
_starter_lock = threading.Lock()


def _start_from_lasting_thread(socket_fd: int) -> "subprocess.Popen[bytes]":
    """Start a child that is to serve the socket."""
    global _starter
    with _starter_lock:
        if _starter is None or _starter.owner != os.getpid():
            _starter = _Starter()
            _starter.start()
    future: Future[subprocess.Popen[bytes]] = Future()
    _starter.jobs.put((lambda: _popen(socket_fd), future))
    return future.result()


def _popen(socket_fd: int) -> "subprocess.Popen[bytes]":
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # Address space for memory, not for a pool per thread: numpy's, one per processor, and malloc's, 64 MiB each.
    lean = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "pipeline.isolate", str(socket_fd), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(socket_fd,),
        env=os.environ | lean | {"PYTHONPATH": paths},
        start_new_session=True,  # a group to kill at once, and out of reach of the terminal's Ctrl-C
    )


def _stop(popen: "subprocess.Popen[bytes]", connection: socket.socket, owner: int) -> None:
    """Kill a child and what it started."""
    if os.getpid() != owner:  # a forked copy of the parent: the child is not its own
        return
    connection.close()
    if popen.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process inside a dead file system cannot even be killed
            popen.wait(STOP_SECONDS)
    if popen.stdout:
        popen.stdout.close()


# Messages


class _Place(NamedTuple):
    """Where the child put an array: in a piece of shared memory, whose descriptor comes along when it is new."""

    number: int
    capacity: int
    size: int
    new: bool


class _Request(NamedTuple):
    """What the child is asked: a function and its arguments, within a limit, and shared memory that it may use again."""

    function: Callable
    arguments: Sequence
    most_bytes: int
    idle: list[int]
    streamed: bool


class _Turn(NamedTuple):
    """While a stream lasts: an item was taken, or it is to stop. It may come too late: then only the memory matters."""

    most_bytes: int
    idle: list[int]
    stop: bool


class _Answer(NamedTuple):
    """A reply as the parent sees it."""

    status: str
    value: Any


class _Reply(NamedTuple):
    """What the child answers: a status (`item`, `value`, `raised`, `memory`), a pickle, its arrays' places, and shared memory that it has let go."""

    status: str
    stream: bytes
    places: list[_Place | bytearray]
    forgotten: list[int]


def _send(connection: socket.socket, payload: bytes, files: Sequence[int] = ()) -> None:
    """One message with file descriptors. A large one is left in memory whose descriptor is the first."""
    if len(payload) <= INLINE_BYTES:
        socket.send_fds(connection, [b"i", payload], list(files))
        return
    with open(os.memfd_create("message", os.MFD_CLOEXEC), "wb", buffering=0) as file:
        view = memoryview(payload)
        while view:
            view = view[file.write(view) :]
        socket.send_fds(connection, [b"f"], [file.fileno(), *files])


def _receive(connection: socket.socket) -> tuple[bytes, deque[int]] | None:
    """One message and its file descriptors; None when the other side is gone."""
    try:
        data, files, flags, _ = socket.recv_fds(connection, INLINE_BYTES + 1, MAX_SHARED + 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None
    if flags & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, "this process may open no more files, not even the memory of a decoded clip; raise `ulimit -n`")
    if not data:
        return None
    files = deque(files)
    if data[:1] == b"i":
        return data[1:], files
    with open(files.popleft(), "rb", buffering=0) as file:
        file.seek(0)
        return file.readall(), files


# The child's side


@dataclass(eq=False)
class _Slab:
    """A piece of memory that both processes map, or will."""

    number: int
    capacity: int
    memory: mmap.mmap
    file: int | None
    """Its descriptor, until the parent has it."""
    array: weakref.ref[np.ndarray] | None = None
    """What was last made on it and not yet sent."""


class _Slabs:
    """The child's shared memory. It is used again: new memory, made and zeroed page by page, takes a quarter of the time of decoding onto it."""

    def __init__(self) -> None:
        self.forgotten: list[int] = []
        self._count = 0
        self._free: list[_Slab] = []
        self._made: dict[int, _Slab] = {}
        self._lent: dict[int, _Slab] = {}

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of bytes that need not be copied to be sent."""
        size = math.prod(shape)
        if size < SHARED_BYTES:
            return np.empty(shape, np.uint8)
        slab = self._fitting(size)
        array = np.frombuffer(slab.memory, np.uint8, size)
        slab.array = weakref.ref(array)
        self._made[array.ctypes.data] = slab
        return array.reshape(shape)

    def place(self, raw: memoryview) -> tuple[_Place, int | None]:
        """Where the parent finds an array, which is copied if it was not made there; also the descriptor of new memory."""
        source = np.frombuffer(raw, np.uint8)
        slab = self._made.pop(source.ctypes.data, None)
        if slab is None or slab.capacity < source.nbytes:
            slab = self._fitting(source.nbytes)
            np.frombuffer(slab.memory, np.uint8, source.nbytes)[:] = source
        if slab.capacity <= SPARE_BYTES:
            self._lent[slab.number] = slab
        file, slab.file = slab.file, None
        return _Place(slab.number, slab.capacity, source.nbytes, file is not None), file

    def take_forgotten(self) -> list[int]:
        """What was let go since the parent was last told."""
        forgotten, self.forgotten = self.forgotten, []
        return forgotten

    def take_back(self, numbers: Sequence[int]) -> None:
        """The parent has no more arrays on these. Of what is free then, the last used is kept."""
        unsent = list(self._made.values())
        in_use = [slab for slab in unsent if slab.array is not None and slab.array() is not None]  # by the function that made it
        self._made.clear()
        self._free = [self._lent.pop(number) for number in reversed(numbers)] + [slab for slab in unsent if slab not in in_use] + self._free
        kept = sum(size <= SPARE_BYTES for size in accumulate(slab.capacity for slab in self._free))
        forgotten, self._free = in_use + self._free[kept:], self._free[:kept]
        self.forgotten += [slab.number for slab in forgotten]
        for slab in forgotten:
            if slab.file is not None:
                os.close(slab.file)

    def _fitting(self, size: int) -> _Slab:
        fitting = [slab for slab in self._free if size <= slab.capacity <= 2 * size]
        if fitting:
            slab = min(fitting, key=lambda slab: slab.capacity)
            self._free.remove(slab)
            return slab
        self._count += 1
        capacity = -(-size // SHARED_BYTES) * SHARED_BYTES
        file = os.memfd_create("result", os.MFD_CLOEXEC)
        os.ftruncate(file, capacity)
        return _Slab(self._count, capacity, mmap.mmap(file, capacity), file)


def serve() -> None:
    """The child: answer calls until the parent is gone."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    _tie_to(parent=int(sys.argv[2]))
    slabs = _Slabs()
    decode_into(slabs.empty)
    _send(connection, b"ready")
    while message := _receive(connection):
        for reply, files in _answers(message[0], slabs, connection):
            _send(connection, pickle.dumps(reply, 5), files)
            for file in files:
                os.close(file)
            del reply
        del message


def _tie_to(parent: int) -> None:
    """Die with the parent and by its will only; be the first that the kernel kills when memory runs out; tell where a crash was."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent has gone")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # a core file of some gigabytes would cost more than the clip
    faulthandler.enable()


def _answers(request: bytes, slabs: _Slabs, connection: socket.socket) -> Iterator[tuple[_Reply, list[int]]]:
    """Do what is asked, within the limit; the replies, and descriptors of new shared memory. None to a turn that comes after its stream's end."""
    try:
        asked: _Request | _Turn = pickle.loads(request)
        slabs.take_back(asked.idle)
        if isinstance(asked, _Turn):
            return
        with _memory_limit(asked.most_bytes):
            if asked.streamed:
                yield from _item_replies(asked.function(*asked.arguments), slabs, connection)
                last = _reply("value", None, slabs)
            else:
                last = _reply("value", asked.function(*asked.arguments), slabs)
    except BaseException as error:  # whatever it is, it is raised again in the parent
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            last = _Reply("memory", b"", [], slabs.take_forgotten()), []
        else:
            last = _Reply("raised", _pickled(error), [], slabs.take_forgotten()), []
    yield last


def _item_replies(iterable: Iterable, slabs: _Slabs, connection: socket.socket) -> Iterator[tuple[_Reply, list[int]]]:
    """A reply for each item, until the stream ends or is stopped. Before the next is made, the parent has taken all but `AHEAD`."""
    heard = select.poll()
    heard.register(connection, select.POLLIN)
    items, waiting = iter(iterable), 0
    for item in items:
        reply = _reply("item", item, slabs)
        del item
        yield reply
        waiting += 1
        while waiting > AHEAD or heard.poll(0):
            message = _receive(connection)
            if message is None:
                sys.exit("the parent has gone")
            turn: _Turn = pickle.loads(message[0])
            slabs.take_back(turn.idle)
            if turn.stop:
                if isinstance(items, Generator):
                    items.close()
                return
            _set_memory_limit(turn.most_bytes)
            waiting -= 1


@contextlib.contextmanager
def _memory_limit(most_bytes: int) -> Iterator[None]:
    """At most so much address space."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    _set_memory_limit(most_bytes)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _set_memory_limit(most_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes if hard == resource.RLIM_INFINITY else min(most_bytes, hard), hard))


def _reply(status: str, value: Any, slabs: _Slabs) -> tuple[_Reply, list[int]]:
    """A value as a pickle, with its large arrays in shared memory."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(value, 5, buffer_callback=buffers.append)
    places: list[_Place | bytearray] = []
    files: list[int] = []
    for buffer in buffers:
        raw = buffer.raw()
        if raw.nbytes < SHARED_BYTES or len(files) == MAX_SHARED:
            places.append(bytearray(raw))
        else:
            place, file = slabs.place(raw)
            places.append(place)
            files += [] if file is None else [file]
    return _Reply(status, stream, places, slabs.take_forgotten()), files


def _pickled(error: BaseException) -> bytes:
    """The exception, with the child's traceback as a note, or if it does not survive being pickled its text."""
    if not isinstance(error, MediaError):  # an outcome like any other
        error.add_note("in the process for native decoding:\n" + "".join(traceback.format_exception(error)))
    try:
        stream = pickle.dumps(error, 5)
        pickle.loads(stream)
        return stream
    except Exception:  # pickling calls the exception's own code
        return pickle.dumps(RuntimeError("".join(traceback.format_exception(error))), 5)


if __name__ == "__main__":
    from pipeline.isolate import serve as _serve  # not as part of `__main__`, whose classes the parent could not unpickle

    _serve()
