"""What goes wrong in native code, as functions that a child process can import; light, because each child does."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.decode import DecodedClip, MediaError, SourceInfo, empty_pictures, open_clip

SOURCE = SourceInfo("mp4", "h264", "yuv420p", 96, 64, "25", 0, 0.0, "aac", 44100, "stereo", 0.0, 0, 0, 0)


class OddError(Exception):
    """An exception whose pickle cannot be read: its constructor takes more than it hands on."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


class FieldsError(Exception):
    """An exception with fields."""

    def __init__(self, code: int, where: Path) -> None:
        super().__init__(code, where)
        self.code = code
        self.where = where


@dataclass(frozen=True)
class Nested:
    """Arrays at several depths."""

    clip: DecodedClip
    views: dict[str, np.ndarray]
    mp4: bytes


def segfault() -> None:
    ctypes.string_at(0)


def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def abort() -> None:
    os.abort()


def leave(status: int) -> None:
    os._exit(status)


def sleep_in_c(seconds: int) -> None:
    """Holds the GIL, as a decoder that hangs may."""
    ctypes.PyDLL(None).sleep(seconds)


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def burn(path: Path, seconds: float) -> None:
    """Says who it is and computes for a time that does not pass while it is stopped."""
    write(path, str(os.getpid()))
    stop = time.process_time() + seconds
    while time.process_time() < stop:
        pass


def spin_with_children(path: Path) -> None:
    """Starts a process of its own, says who both are, and never returns."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    write(path, f"{os.getpid()} {other.pid}")
    while True:
        pass


def write(path: Path, text: str) -> None:
    """All at once: whoever finds the file finds it whole."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def allocate(mb: int, *, touch: bool = False) -> int:
    array = np.empty(mb << 20, np.uint8)
    if touch:
        array[:] = 1
    return array.nbytes


def grow_and_sleep(mb: int, seconds: float) -> None:
    np.empty(mb << 20, np.uint8)
    time.sleep(seconds)


def allocate_without_end() -> None:
    taken = []
    while True:
        taken.append(np.empty(64 << 20, np.uint8))


def shout(mb: int, then: str) -> str:
    """Megabytes to stdout and stderr, below Python."""
    line = b"x" * 1023 + b"\n"
    for n in range(mb << 10):
        os.write(1 + n % 2, line)
    os.write(2, b"[h264 @ 0x7f00deadbeef] the last words\n")
    if then == "die":
        os._exit(7)
    return then


def close_words() -> int:
    os.close(1)
    os.close(2)
    time.sleep(0.05)
    return os.getpid()


def raise_fields() -> None:
    raise FieldsError(7, Path("somewhere"))


def raise_odd() -> None:
    raise OddError("one", "two")


def raise_media_error() -> None:
    raise MediaError("truncated", "half of it")


def decoded(frames: int, height: int, width: int, seed: int) -> DecodedClip:
    """A clip made of noise, in memory as pictures are."""
    pictures = empty_pictures(frames, height, width)
    pictures[:] = np.random.default_rng(seed).integers(0, 256, pictures.shape, dtype=np.uint8)
    sound = np.linspace(-1, 1, 2 * 300_007, dtype=np.float32).reshape(2, -1)
    return DecodedClip(pictures, sound, 44100, 25, SOURCE)


def nested(seed: int) -> Nested:
    clip = decoded(7, 301, 503, seed)
    views = {
        "zero": np.zeros((0, 5), np.float32),
        "strided": clip.frames[::2, :, ::3],
        "fortran": np.asfortranarray(clip.audio),
        "again": clip.frames,
        "first": clip.frames[:3],
        "inner": clip.frames[1:],
        "scalar": np.array(3.5),
        "structured": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        "text": np.array(["ab", "cde"]),
    }
    return Nested(clip, views, bytes(range(256)) * 9001)


_kept: list[np.ndarray] = []


def keep_pictures(value: int) -> tuple[int, ...]:
    """Pictures that outlive their call, and what those of earlier calls hold."""
    pictures = empty_pictures(5, 512, 512)
    pictures[:] = value
    _kept.append(pictures)
    return tuple(int(kept.max()) for kept in _kept)


def fail_with_pictures() -> None:
    empty_pictures(5, 512, 512)[:] = 1
    raise MediaError("undecodable", "after the pictures")


def many_arrays(count: int, size: int) -> list[np.ndarray]:
    return [np.full(size, n % 251, np.uint8) for n in range(count)]


def counted(path: Path, count: int) -> Iterator[int]:
    """Numbers; the file says how many were asked for, and how it ended."""
    try:
        for n in range(count):
            write(path, str(n + 1))
            yield n
    finally:
        write(path, path.read_text() + " closed")


def piece(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (1, size + n, 5, 3), dtype=np.uint8)


def pieces(count: int, size: int, then: str = "") -> Iterator[np.ndarray]:
    """Arrays of noise, half of them made where they are sent from; afterwards a fault or a long time."""
    for n in range(count):
        array = empty_pictures(1, size + n, 5) if n % 2 else np.empty((1, size + n, 5, 3), np.uint8)
        array[:] = piece(n, size)
        yield array
        del array
    match then:
        case "raise":
            raise MediaError("undecodable", "the rest of it")
        case "die":
            os._exit(3)
        case "sleep":
            time.sleep(60)
        case "memory":
            allocate(4000)


def fragile(path: Path, count: int) -> Iterator[int]:
    """Numbers, with a death after the third the first time."""
    for n in range(count):
        if n == 3 and not path.exists():
            write(path, "died")
            os.kill(os.getpid(), signal.SIGKILL)
        yield n


def growing(count: int, mb: int) -> Iterator[int]:
    """Keeps more memory with each number."""
    kept = []
    for n in range(count):
        kept.append(np.empty(mb << 20, np.uint8))
        yield n


def deaf(seconds: float) -> Iterator[int]:
    """Does not come to its second item in time."""
    yield os.getpid()
    time.sleep(seconds)
    yield 0


def held_whole(path: Path) -> int:
    """A clip's packets in memory, as they are for anything but a film."""
    with open_clip(path) as clip:
        return clip.frames


def echo(*values: object) -> object:
    return values[0] if len(values) == 1 else values


def loose_thread() -> int:
    """Leaves a thread behind that never ends."""
    threading.Thread(target=time.sleep, args=(300,), daemon=False).start()
    return os.getpid()


@dataclass(frozen=True)
class Self:
    """What a process says of itself."""

    pid: int
    heavy: list[str]
    group: int
    oom_score_adj: int
    interrupt: object
    descriptors: int


def about_me() -> Self:
    heavy = [name for name in ("torch", "ray", "lightning", "pyarrow") if name in sys.modules]
    score = int(Path("/proc/self/oom_score_adj").read_text())
    return Self(os.getpid(), heavy, os.getpgid(0), score, signal.getsignal(signal.SIGINT), len(os.listdir("/proc/self/fd")))


def once_killed(path: Path, number: int) -> str:
    """Is killed the first time, as by someone outside; answers the second time."""
    if path.exists():
        return "answered"
    path.touch()
    die(number)
    raise AssertionError


def poison(path: Path) -> int:
    """Spoils the process for the next call, as a decoder that writes where it should not may."""
    path.touch()
    return os.getpid()


def poisoned(path: Path, own: int) -> int:
    """Crashes in the process that was spoilt, and only there."""
    if path.exists() and own == os.getpid():
        segfault()
    return os.getpid()
