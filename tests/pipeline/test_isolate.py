"""Native decoding in its own process: real crashes, hangs and floods of memory, and what comes back of whole results."""

import gc
import hashlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray

from pipeline import isolate
from pipeline.isolate import Child, Limits, call, last_words
from pipeline.media import EncodeConfig, MediaError, decode, picture_pieces, reencode
from tests.pipeline import faults
from tests.pipeline.clips import make_clip

LIMITS = Limits(clip_seconds=60.0, clip_memory_mb=1024)
QUICK = Limits(clip_seconds=0.4, clip_memory_mb=1024)


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child(LIMITS)
    yield child
    child.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    make_clip(path, width=480, height=270)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "large.mp4"
    make_clip(path, width=1280, height=720, seconds=Fraction(16, 25), flash_picture=3)
    return path


def gone(pid: int, within_seconds: float = 20.0) -> bool:
    """Whether a process ends in time."""
    stop = time.monotonic() + within_seconds
    while time.monotonic() < stop:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def appears(path: Path) -> str:
    """A file's text, as soon as it is there."""
    stop = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < stop, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


# Results


def test_a_clip_comes_back_as_it_would_be_in_process(child: Child, clip: Path) -> None:
    work = partial(decode, sample_rate_hz=24000, channels=1)
    plain, isolated = work(clip), child.call(work, clip.read_bytes())
    assert plain.frames.nbytes > isolate.SHARED_BYTES
    assert np.array_equal(isolated.frames, plain.frames) and np.array_equal(isolated.audio, plain.audio)
    assert (isolated.source, isolated.sample_rate_hz, isolated.frame_rate_hz) == (plain.source, 24000, 25)
    assert isolated.frames.flags.writeable and isolated.audio.flags.writeable


def test_reencoded_bytes_and_pictures_are_those_of_the_same_function_in_process(child: Child, clip: Path) -> None:
    work = partial(reencode, keep_frames=True)
    plain, isolated = work(clip, EncodeConfig(short_side=128)), child.call(work, clip, EncodeConfig(short_side=128))
    assert isolated.mp4 == plain.mp4 and isolated.record() == plain.record()
    assert plain.pictures is not None and isolated.pictures is not None and plain.pictures.nbytes > isolate.SHARED_BYTES
    assert np.array_equal(isolated.pictures, plain.pictures) and isolated.audio is not None


def test_every_kind_of_array_survives_the_way_back(child: Child) -> None:
    expected, got = faults.nested(3), child.call(faults.nested, 3)
    assert np.array_equal(got.clip.frames, expected.clip.frames) and np.array_equal(got.clip.audio, expected.clip.audio)
    assert got.mp4 == expected.mp4 and type(got.mp4) is bytes
    for name, array in expected.views.items():
        assert got.views[name].dtype == array.dtype and got.views[name].shape == array.shape, name
        assert np.array_equal(got.views[name], array), name
    got.views["first"][:] = 0  # arrays that shared memory in the child are on their own here
    assert np.array_equal(got.clip.frames, expected.clip.frames)


def test_memory_is_used_again_only_when_nobody_looks_at_it(child: Child) -> None:
    held, expected = [], []
    for seed in range(6):
        clip = child.call(faults.decoded, 5, 300, 401, seed)
        if seed % 2:
            held.append(clip.frames[2:, ::2])  # a view is enough to keep it
            expected.append(faults.decoded(5, 300, 401, seed).frames[2:, ::2])
        del clip
    assert all(np.array_equal(got, wanted) for got, wanted in zip(held, expected, strict=True))
    assert child._process is not None
    assert len(child._process._shared) < 8  # 12 arrays came, 6 were let go: 3 are held, and few more exist


def test_arrays_outlive_their_process(child: Child) -> None:
    clip = child.call(faults.decoded, 5, 300, 401, 11)
    with pytest.raises(MediaError):
        child.call(faults.segfault)
    other = child.call(faults.decoded, 5, 300, 401, 12)
    child.close()
    assert np.array_equal(clip.frames, faults.decoded(5, 300, 401, 11).frames)
    assert np.array_equal(other.frames, faults.decoded(5, 300, 401, 12).frames)


def test_spare_memory_is_bounded(child: Child) -> None:
    size = isolate.SPARE_BYTES // 4 + 1
    for mb in (1, 2, 4, 8, 16, 32, 64):
        child.call(faults.many_arrays, 1, mb << 20)
    held = [child.call(faults.many_arrays, 1, size + n) for n in range(5)]
    assert child._process is not None
    del held
    child.call(faults.echo, 1)
    assert sum(len(memory) for memory in child._process._shared.values()) <= isolate.SPARE_BYTES
    large = child.call(faults.many_arrays, 1, isolate.SPARE_BYTES + 5)
    assert len(large[0]) == isolate.SPARE_BYTES + 5 and large[0][-1] == 0
    assert sum(len(memory) for memory in child._process._shared.values()) <= isolate.SPARE_BYTES


def test_pictures_that_stay_in_the_child_are_not_overwritten(child: Child) -> None:
    assert child.call(faults.keep_pictures, 1) == (1,)
    assert child.call(faults.keep_pictures, 2) == (1, 2)
    child.call(faults.decoded, 5, 512, 512, 0)
    assert child.call(faults.keep_pictures, 3) == (1, 2, 3)


def test_a_failed_call_leaves_no_shared_memory_or_descriptor_behind(child: Child) -> None:
    child.call(faults.keep_pictures, 1)
    before, ours = child.call(faults.about_me).descriptors, len(os.listdir("/proc/self/fd"))
    for n in range(9):
        child.call(faults.decoded, 5, 300, 401, n)
        child.call(faults.keep_pictures, n)
        with pytest.raises(MediaError, match="after the pictures"):
            child.call(faults.fail_with_pictures)
    gc.collect()
    assert child.call(faults.about_me).descriptors <= before + 9 + 4  # what the function kept has one each
    assert len(os.listdir("/proc/self/fd")) <= ours + 3


@pytest.mark.parametrize(("count", "size"), [(0, 0), (1, 0), (1, 1), (300, 70_001), (230, isolate.SHARED_BYTES)])
def test_any_number_of_arrays(child: Child, count: int, size: int) -> None:
    arrays = child.call(faults.many_arrays, count, size)
    assert [array.shape for array in arrays] == [(size,)] * count
    assert all((array == n % 251).all() for n, array in enumerate(arrays))


@pytest.mark.parametrize("size", [0, 1, isolate.INLINE_BYTES - 200, isolate.INLINE_BYTES, isolate.INLINE_BYTES + 1, 3_000_017])
def test_bytes_of_any_size_go_and_come(child: Child, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert child.call(faults.echo, data) == data


def test_exceptions_come_through_as_they_are(child: Child) -> None:
    with pytest.raises(MediaError) as media:
        child.call(faults.raise_media_error)
    assert (media.value.reason, media.value.message, str(media.value)) == ("truncated", "half of it", "truncated: half of it")
    with pytest.raises(faults.FieldsError) as fields:
        child.call(faults.raise_fields)
    assert fields.value.code == 7 and fields.value.where == Path("somewhere")
    assert "in raise_fields" in fields.value.__notes__[0], "the child's traceback"
    with pytest.raises(RuntimeError, match="OddError: onetwo"):
        child.call(faults.raise_odd)
    with pytest.raises(TypeError, match="cannot pickle"):
        child.call(threading.Lock)
    assert child.call(faults.echo, 5) == 5 and child._process is not None and child._process.calls == 5


def test_a_missing_clip_is_a_missing_clip(child: Child, tmp_path: Path) -> None:
    with pytest.raises(MediaError) as error:
        child.call(decode, tmp_path / "none.mp4")
    assert error.value.reason == "missing"


def test_the_child_is_light_ready_to_be_killed_first_and_deaf_to_the_keyboard(child: Child) -> None:
    me = child.call(faults.about_me)
    assert me.heavy == [] and me.oom_score_adj == 1000 and me.interrupt == signal.SIG_IGN and me.group == me.pid != os.getpid()
    os.kill(me.pid, signal.SIGINT)
    os.kill(me.pid, signal.SIGTERM)
    assert child.call(os.getpid) == me.pid


# Faults


@pytest.mark.parametrize(
    ("function", "arguments", "reason", "message"),
    [
        (faults.segfault, (), "crashed", r"died of SIGSEGV: Fatal Python error: Segmentation fault \| File .*ctypes.*in string_at \| .* in segfault"),
        (faults.abort, (), "crashed", r"died of SIGABRT"),
        (faults.die, (signal.SIGFPE,), "crashed", r"died of SIGFPE"),
        (faults.die, (signal.SIGSYS,), "crashed", r"died of SIGSYS$"),
        (faults.leave, (3,), "crashed", r"ended with status 3$"),
        (faults.leave, (0,), "crashed", r"ended with status 0$"),
        (faults.die, (signal.SIGKILL,), "crashed", r"died of SIGKILL$"),
        (faults.allocate, (2000,), "out_of_memory", r"more than clip_memory_mb=1024$"),
        (faults.allocate_without_end, (), "out_of_memory", r"more than clip_memory_mb=1024$"),
        (faults.shout, (3, "die"), "crashed", r"ended with status 7: .*xxx \| \[h264 @ 0x\.\.\] the last words$"),
    ],
)
def test_a_fault_costs_one_call(child: Child, function: Callable, arguments: tuple, reason: str, message: str) -> None:
    first = child.call(os.getpid)
    with pytest.raises(MediaError) as error:
        child.call(function, *arguments)
    assert error.value.reason == reason
    assert re.search(message, error.value.message), error.value.message
    assert len(error.value.message) < 800
    assert gone(first, 1.0)
    assert child.call(faults.echo, "next") == "next"


def test_messages_of_faults_do_not_differ_from_run_to_run(child: Child) -> None:
    messages = set()
    for _ in range(2):
        child.close()
        with pytest.raises(MediaError) as error:
            child.call(faults.segfault)
        messages.add(error.value.message)
    assert len(messages) == 1


@pytest.mark.parametrize("function", [faults.sleep_in_c, time.sleep])
def test_a_hanging_call_is_given_up(function: Callable) -> None:
    child = Child(QUICK)
    pid = child.call(os.getpid)
    with pytest.raises(MediaError) as error:
        child.call(function, 60)
    assert (error.value.reason, error.value.message) == ("timeout", "not done after clip_seconds=0.4")
    assert gone(pid, 1.0) and child.call(os.getpid) != pid
    child.close()


def test_what_a_hanging_call_started_is_killed_with_it(tmp_path: Path) -> None:
    child = Child(Limits(clip_seconds=3.0))
    with pytest.raises(MediaError, match="timeout"):
        child.call(faults.spin_with_children, tmp_path / "pids")
    own, other = map(int, (tmp_path / "pids").read_text().split())
    assert gone(own, 1.0) and gone(other, 5.0)


def test_the_time_to_start_is_not_the_clips() -> None:
    child = Child(Limits(clip_seconds=0.1))  # Python alone takes about as long
    assert child.call(faults.echo, 1) == 1
    child.close()


def test_memory_is_counted_from_what_is_there_before_the_clip(child: Child) -> None:
    held = child.call(faults.many_arrays, 1, 450 << 20)
    assert child.call(faults.allocate, 900) == 900 << 20, "the earlier result is not this clip's"
    assert len(held[0]) == 450 << 20


def test_floods_of_words_neither_block_nor_grow(child: Child) -> None:
    assert child.call(faults.shout, 5, "alive") == "alive"
    assert child._process is not None and len(child._process._words) <= isolate.STDERR_BYTES
    pid = child.call(faults.close_words)
    assert child.call(os.getpid) == pid
    with pytest.raises(MediaError, match="SIGSEGV"):
        child.call(faults.segfault)


def test_a_clip_is_not_blamed_for_what_another_did(child: Child, tmp_path: Path) -> None:
    spoilt = child.call(faults.poison, tmp_path / "mark")
    assert child.call(faults.poisoned, tmp_path / "mark", spoilt) != spoilt


def test_a_clip_is_not_blamed_for_a_kill_from_outside(child: Child, tmp_path: Path) -> None:
    assert child.call(faults.once_killed, tmp_path / "fresh", signal.SIGKILL) == "answered"
    os.kill(child.call(os.getpid), signal.SIGKILL)  # while it is idle
    assert child.call(faults.echo, 2) == 2


@pytest.mark.parametrize("mb", [3, 20, 45])
def test_a_real_clip_that_needs_too_much_is_never_called_damaged(large: Path, mb: int) -> None:
    """x264 and FFmpeg's decoders answer a failed allocation with "error in an external library" or packets that cannot be decoded."""
    child = Child(Limits(clip_memory_mb=mb))
    with pytest.raises(MediaError) as error:
        child.call(reencode, large)
    assert error.value.reason == "out_of_memory"
    child.close()


def test_a_real_clip_with_memory_enough(large: Path) -> None:
    child = Child(Limits(clip_memory_mb=400))
    assert child.call(reencode, large).frames == 16
    child.close()


def test_growth_is_noticed_while_it_happens() -> None:
    child = Child(Limits(clip_seconds=60.0, clip_memory_mb=100))
    child.call(os.getpid)
    started = time.monotonic()
    with pytest.raises(MediaError, match="out_of_memory"):
        child.call(faults.grow_and_sleep, 200, 55)
    assert time.monotonic() - started < 50  # the function itself takes longer
    child.close()


def test_limits_say_what_is_wrong_with_them() -> None:
    with pytest.raises(ValueError, match="clip_seconds is 0; expected more than 0"):
        Limits(clip_seconds=0.0)
    with pytest.raises(ValueError, match="clip_memory_mb is 0"):
        Limits(clip_memory_mb=0)


def test_last_words() -> None:
    assert last_words("") == ""
    assert last_words("a\n\n  b at 0xDEAD01 \n") == "a | b at 0x.."
    assert last_words("\n".join(map(str, range(9)))) == "4 | 5 | 6 | 7 | 8"
    assert len(last_words("x" * 5000)) == isolate.WORDS_CHARACTERS


# Streams


def test_a_stream_gives_what_the_generator_does(child: Child, clip: Path) -> None:
    whole = decode(clip).frames
    pieces = list(child.stream(partial(picture_pieces, piece_frames=7), clip.read_bytes()))
    assert [len(piece) for piece in pieces] == [7] * 7 + [1] and np.array_equal(np.concatenate(pieces), whole)
    assert [piece.tolist() for piece in child.stream(faults.pieces, 5, 3)] == [faults.piece(n, 3).tolist() for n in range(5)]
    assert list(child.stream(faults.many_arrays, 0, 1)) == [] and list(child.stream(range, 300)) == list(range(300))
    assert child._process is not None and child._process.calls == 4


@pytest.mark.parametrize("hold", [False, True])
def test_memory_of_a_stream_is_used_again_when_nobody_looks_at_it(child: Child, hold: bool) -> None:
    held, size = [], isolate.SHARED_BYTES // 15 + 1
    for n, array in enumerate(child.stream(faults.pieces, 23, size)):
        assert np.array_equal(array, faults.piece(n, size))
        held += [array] if hold else []
    assert all(np.array_equal(array, faults.piece(n, size)) for n, array in enumerate(held))
    assert child._process is not None
    del array
    assert len(child._process._shared) == 23 if hold else len(child._process._shared) <= 2 * (isolate.AHEAD + 2)
    del held
    descriptors = child.call(faults.about_me).descriptors
    for _ in range(3):
        next(child.stream(faults.pieces, 9, size))
        gc.collect()
    assert child.call(faults.about_me).descriptors <= descriptors + 2
    assert sum(len(memory) for memory in child._process._shared.values()) <= isolate.SPARE_BYTES


def test_a_stream_waits_for_its_taker(child: Child, tmp_path: Path) -> None:
    items = child.stream(faults.counted, tmp_path / "made", 50)
    for n in range(7):
        assert next(items) == n
    time.sleep(0.3)
    assert 7 <= int((tmp_path / "made").read_text()) <= 7 + isolate.AHEAD
    assert child._process is not None
    pid = child._process._popen.pid
    items.close()
    assert (tmp_path / "made").read_text().endswith(" closed")
    assert child.call(os.getpid) == pid, "the process goes on"


def test_a_stream_that_is_let_go_of_ends(tmp_path: Path) -> None:
    idle = len(isolate._idle)
    items = isolate.stream(faults.counted, tmp_path / "made", 50, limits=LIMITS)
    assert next(items) == 0 and len(isolate._idle) == max(0, idle - 1)
    del items
    assert (tmp_path / "made").read_text().endswith(" closed") and len(isolate._idle) == max(1, idle)
    never = isolate.stream(faults.counted, tmp_path / "never", 50, limits=LIMITS)
    never.close()
    assert not (tmp_path / "never").exists() and len(isolate._idle) == max(1, idle)


@pytest.mark.parametrize(
    ("then", "reason", "message"),
    [
        ("raise", "undecodable", "the rest of it"),
        ("die", "crashed", "status 3"),
        ("sleep", "timeout", "clip_seconds=0.9"),
        ("memory", "out_of_memory", "1024"),
    ],
)
def test_a_fault_comes_after_the_items_before_it(then: str, reason: str, message: str) -> None:
    child, got = Child(Limits(clip_seconds=0.9, clip_memory_mb=1024)), []
    for before in range(2):  # in a fresh process, and in one that has worked before
        with pytest.raises(MediaError, match=message) as error:
            got.extend(child.stream(faults.pieces, 4, 11, then))  # one by one: what came before the fault stays
        assert error.value.reason == reason and len(got) == 4 * (before + 1)
        assert child.call(faults.echo, 5) == 5
    child.close()


def test_time_is_counted_only_while_somebody_waits() -> None:
    child = Child(QUICK)
    assert [time.sleep(0.25) or n for n in child.stream(range, 5)] == list(range(5))
    child.close()


def test_a_stream_that_was_killed_from_outside_goes_on(child: Child, tmp_path: Path) -> None:
    assert list(child.stream(faults.fragile, tmp_path / "died", 9)) == list(range(9))
    assert (tmp_path / "died").exists()


def test_memory_of_a_stream_is_limited_as_a_whole() -> None:
    child = Child(Limits(clip_memory_mb=60))
    with pytest.raises(MediaError, match="out_of_memory"):
        list(child.stream(faults.growing, 40, 30))
    held = list(child.stream(faults.pieces, 40, 200_000))  # 115 MiB, but the taker's
    assert len(held) == 40
    child.close()


def test_a_stream_that_does_not_hear_is_ended(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "STOP_SECONDS", 0.3)
    items = child.stream(faults.deaf, 60)
    pid = next(items)
    time.sleep(0.3)  # it has begun with the next
    items.close()
    assert gone(pid, 2.0) and child.call(os.getpid) != pid


# Threads, processes and their ends


def test_calls_at_the_same_time_have_processes_of_their_own_which_later_threads_use_again() -> None:
    pids: list[list[int]] = []
    for _ in range(2):
        barrier = threading.Barrier(3)

        def pid(_: int, barrier: threading.Barrier = barrier) -> int:
            barrier.wait()
            return call(faults.nap, 1.0, limits=LIMITS)

        with ThreadPoolExecutor(3) as pool:
            pids.append(sorted(pool.map(pid, range(3))))
    assert len(set(pids[0])) == 3 and pids[0] == pids[1]


def test_a_child_outlives_the_thread_that_started_it() -> None:
    child, pids = Child(LIMITS), []
    thread = threading.Thread(target=lambda: pids.append(child.call(os.getpid)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert child.call(os.getpid) == pids[0]
    child.close()


def test_other_limits_take_effect() -> None:
    assert call(faults.allocate, 200, limits=Limits(clip_memory_mb=400)) == 200 << 20
    with pytest.raises(MediaError, match="out_of_memory"):
        call(faults.allocate, 200, limits=Limits(clip_memory_mb=100))


def test_an_interrupted_call_ends_its_process(child: Child) -> None:
    pid = child.call(os.getpid)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.call(time.sleep, 60)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert gone(pid, 1.0) and child.call(faults.echo, "fresh") == "fresh"


PARENT = """
import os, sys, threading, time
from pathlib import Path
from pipeline.isolate import Child, Limits, call
from tests.pipeline import faults
limits = Limits(clip_seconds=300.0)
{body}
"""


def start_parent(body: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PARENT.format(body=body), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("work", ["faults.spin_with_children, Path(sys.argv[1])", "faults.loose_thread"])
def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path, work: str) -> None:
    body = f"pid = call(os.getpid, limits=limits); print(pid, flush=True); call({work}, limits=limits); time.sleep(300)"
    parent = start_parent(body, tmp_path / "pids")
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    others = [int(word) for word in appears(tmp_path / "pids").split()[1:]] if "spin" in work else []
    time.sleep(0.3)
    parent.kill()
    parent.communicate()
    assert gone(pid, 2.0)
    for other in others:  # a decoder's own processes are its own; ours are in its group
        os.kill(other, signal.SIGKILL)


def test_nothing_is_left_when_the_parent_ends() -> None:
    body = """
print(call(os.getpid, limits=limits), Child(limits).call(os.getpid))
thread = threading.Thread(target=lambda: print(call(os.getpid, limits=limits)))
thread.start()
thread.join()
kept = Child(limits)
print(kept.call(faults.loose_thread))
"""
    parent = start_parent(body)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 0 and err == ""
    assert len(out.split()) == 4 and all(gone(int(pid), 2.0) for pid in out.split())


def test_time_on_a_frozen_machine_is_not_the_clips(tmp_path: Path) -> None:
    body = """
import pipeline.isolate
pipeline.isolate.POLL_SECONDS = 0.1
call(faults.burn, Path(sys.argv[1]), 0.7, limits=Limits(clip_seconds=4.0))
print("done")
"""
    parent = start_parent(body, tmp_path / "pid")
    pids = [int(appears(tmp_path / "pid")), parent.pid]
    for number, seconds in ((signal.SIGSTOP, 4.5), (signal.SIGCONT, 0)):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(seconds)
    out, err = parent.communicate(timeout=60)
    assert out == "done\n", err


def test_a_forked_copy_starts_its_own(child: Child) -> None:
    pid = child.call(os.getpid)
    queue = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=lambda: queue.put(child.call(os.getpid)))
    process.start()
    process.join(30)
    other = queue.get()
    assert other != pid and gone(other, 5.0)
    assert child.call(os.getpid) == pid


def test_in_a_ray_worker(ray_cluster: None, clip: Path) -> None:  # noqa: ARG001
    class Decoder:
        """As an actor that decodes in threads."""

        def run(self, path: str) -> tuple[list[str], str, list[int]]:
            limits = Limits(clip_seconds=60.0, clip_memory_mb=1024)
            with ThreadPoolExecutor(2) as pool:
                clips = list(pool.map(lambda _: call(decode, path, limits=limits), range(3)))
            reason = ""
            try:
                call(faults.segfault, limits=limits)
            except MediaError as error:
                reason = str(error)
            with ThreadPoolExecutor(2) as pool:
                pids = list(pool.map(lambda _: call(faults.nap, 0.5, limits=limits), range(2)))
            return [hashlib.sha256(clip.frames.tobytes()).hexdigest() for clip in clips], reason, pids

    actor = ray.remote(Decoder).remote()
    hashes, reason, pids = ray.get(actor.run.remote(str(clip)))  # type: ignore[attr-defined]  # Ray's actors are not typed
    assert set(hashes) == {hashlib.sha256(decode(clip).frames.tobytes()).hexdigest()}
    assert "SIGSEGV" in reason
    ray.kill(actor)  # type: ignore[arg-type]  # the same
    assert len(set(pids)) == 2 and all(gone(pid, 10.0) for pid in pids)
