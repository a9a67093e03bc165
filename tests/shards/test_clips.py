"""Prepared clips: the same samples for any ranks, processes and interruption; what is refused is replaced or left out, what fails is named."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import storage
from shards.clips import ClipBatch, ClipConfig, ClipStream, SkipClip
from shards.dataset import DatasetMismatch, create_or_check, new_info
from shards.read import Index
from shards.write import Entry, write_shard

EXAMPLES = settings(deadline=None, database=None, max_examples=15)
CONFIG = ClipConfig(batch_size=6, seed=5, prefetch=0)
CLIPS = 23


def clip(number, seconds=10.0):
    return Entry(f"clip_{number}", "train", None, f"{number}.mp4", seconds, {"mp4": bytes([number]) * (2000 + number), "json": b"{}"})


def dataset(root, shards):
    create_or_check(root, new_info("media", {"frame_rate_hz": 25}))
    for number, entries in enumerate(shards):
        write_shard(root, f"train-{number:06d}", entries)
    return str(root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Clips of 10 s in shards of unequal size, but the 4th, which is shorter, and the 7th, of which the length is not known; and a failed one."""
    numbers, seconds = iter(range(CLIPS)), {4: 3.0, 7: None}
    shards = [[clip(n, seconds.get(n, 10.0)) for _, n in zip(range(size), numbers, strict=False)] for size in (2, 13, 8)]
    failed = Entry("bad", "train", None, "bad.mp4", reason="empty", message="")
    return dataset(tmp_path_factory.mktemp("clips") / "set", [*shards, [failed]])


@dataclass(frozen=True)
class Toy:
    """Tells the clip's bytes, its seed and the process; refuses some clips, and fails at others."""

    short: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    killed: tuple[str, ...] = ()

    def __call__(self, mp4: bytes, key: str, seed: int) -> dict[str, torch.Tensor]:
        if key in self.short:
            raise SkipClip("2.1 s, and a cut is 5 s")
        if key in self.broken:
            raise RuntimeError("moov atom not found")
        if key in self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        assert set(mp4) == {int(key.removeprefix("clip_"))} and len(mp4) == 2000 + mp4[0]
        pixels = torch.full((3, 4), mp4[0], dtype=torch.uint8)
        return {"pixels": pixels, "seed": torch.tensor(seed), "process": torch.tensor(os.getpid())}


opened = lru_cache(Index.open)


def stream(root, rank=0, world=1, *, prepare=None, shuffle=True, repeats=1, state=None, **values):
    made = ClipStream(
        root if isinstance(root, Index) else opened(root),
        replace(CONFIG, **values),
        rank,
        world,
        prepare=prepare or Toy(),
        shuffle=shuffle,
        repeats=repeats,
    )
    if state is not None:
        made.load_state_dict(state)
    return made


def take(made, steps):
    iterator = iter(made)
    batches = [next(iterator) for _ in range(steps)]
    iterator.close()
    return batches


def told(batch: ClipBatch):
    """(key, seed) of every clip of a batch."""
    assert batch["pixels"].dtype == torch.uint8 and batch["pixels"].shape == (len(batch["keys"]), 3, 4)
    assert batch["pixels"][:, 0, 0].tolist() == [int(key.removeprefix("clip_")) for key in batch["keys"]]
    return list(zip(batch["keys"], batch["seed"].tolist(), strict=True))


ALL = sorted(f"clip_{n}" for n in range(CLIPS))


# --- training -------------------------------------------------------------------------------------------------------------------------


def test_each_clip_once_an_epoch_with_another_seed(root):
    clips = [clip for batch in take(stream(root), 16) for clip in told(batch)]
    for epoch in range(4):
        assert sorted(key for key, _ in clips[CLIPS * epoch : CLIPS * (epoch + 1)]) == ALL
    assert len({seed for _, seed in clips}) == len(clips) and all(0 <= seed < 2**63 for _, seed in clips)
    assert (stream(root).samples, stream(root).skipped, stream(root).steps_per_epoch) == (CLIPS, 0, 3)


@EXAMPLES
@given(data=st.data(), lanes=st.sampled_from([2, 6]))
def test_any_chain_of_ranks_gives_the_uninterrupted_clips(root, data, lanes):
    values, clips, state = {"lanes": lanes, "prepare": Toy(short=("clip_2", "clip_3", "clip_22"))}, [], None
    for _ in range(data.draw(st.integers(1, 3))):
        world = data.draw(st.sampled_from([ranks for ranks in (1, 2, 3) if lanes % ranks == 0]))
        size, steps = world * data.draw(st.integers(1, 5)), data.draw(st.integers(0, 4))
        ranks = [
            stream(root, rank, world, state=state, batch_size=size, prefetch=data.draw(st.sampled_from([0, 2])), **values) for rank in range(world)
        ]
        shares = [[clip for batch in take(one, steps) for clip in told(batch)] for one in ranks]
        clips += [clip for step in zip(*shares, strict=True) for clip in step]
        state = ranks[0].state_dict()
    expected = (clip for batch in stream(root, batch_size=1, **values) for clip in told(batch))
    assert clips == [clip for _, clip in zip(range(len(clips)), expected, strict=False)]


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_change_nothing_and_end_with_the_stream(root, workers):
    prepare = Toy(short=("clip_2", "clip_3"))
    expected = [told(batch) for batch in take(stream(root, prepare=prepare), 9)]
    made = stream(root, prepare=prepare, workers=workers, prefetch=2)
    batches = take(made, 5)
    assert [told(batch) for batch in batches] == expected[:5] and made.consumed == 30 and set(made.refused) == {"clip_2", "clip_3"}
    processes = {int(number) for batch in batches for number in batch["process"]}
    assert len(processes) <= workers and os.getpid() not in processes
    again = stream(root, 1, 2, prepare=prepare, workers=workers, state=made.state_dict())
    assert [told(batch) for batch in take(again, 4)] == [batch[1::2] for batch in expected[5:]]
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not multiprocessing.active_children()
    assert not [thread for thread in threading.enumerate() if thread.name == "soundshard-prefetch"]


def test_the_next_clip_takes_the_place_of_a_refused_one(root, caplog):
    short = ("clip_5", "clip_6", "clip_22")
    made, untouched = (stream(root, prepare=Toy(short=each), run_on=False) for each in (short, ()))
    clips, others = ([clip for batch in one for clip in told(batch)] for one in (made, untouched))
    stand_in = {"clip_5": "clip_7", "clip_6": "clip_7", "clip_22": "clip_0"}
    assert [key for key, _ in clips] == [stand_in.get(key, key) for key, _ in others]
    assert [clip for clip, other in zip(clips, others, strict=True) if other[0] not in stand_in and clip != other] == []
    assert max(Counter(clips).values()) == 1
    refused = {key: "2.1 s, and a cut is 5 s" for key in short if key in dict(others)}
    assert made.refused == refused and made.skipped == len(refused) >= 2 and sorted(made.skipped_keys) == sorted(refused)
    assert sorted(record.getMessage() for record in caplog.records) == sorted(f"{key} is left out: 2.1 s, and a cut is 5 s" for key in refused)
    with pytest.raises(ValueError, match=r"nothing can be made of clip clip_\d+, nor of the 100 after it; the last one's reason: 2.1 s"):
        take(stream(root, prepare=Toy(short=tuple(ALL))), 1)


def test_a_clip_that_fails_ends_the_stream_and_is_named(root):
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"/set: clip clip_9 could not be prepared: RuntimeError: moov atom not found"):
            list(stream(root, prepare=Toy(broken=("clip_9",)), shuffle=False, workers=workers))


def test_a_process_that_is_killed_ends_the_stream(root):
    with pytest.raises(RuntimeError, match=r"ended abruptly, at clip_\d+ or a clip near it: .*/dev/shm"):
        list(stream(root, prepare=Toy(killed=("clip_9",)), shuffle=False, workers=2))


@dataclass(frozen=True)
class Slow:
    """Leaves a file for every clip that it prepares."""

    folder: str

    def __call__(self, mp4: bytes, key: str, seed: int) -> dict[str, torch.Tensor]:
        open(f"{self.folder}/{key}-{seed}", "w").close()
        time.sleep(0.05)
        return {"size": torch.tensor(len(mp4))}


def test_leaving_does_not_wait_for_what_is_ahead(root, tmp_path):
    take(stream(root, prepare=Slow(str(tmp_path)), workers=1, prefetch=30), 1)
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not multiprocessing.active_children() and 6 <= len(list(tmp_path.iterdir())) < 60  # of 186 that were asked for


def test_processes_do_not_outlive_a_killed_parent(root):
    """They wait for work that will not come, and would for ever."""
    here, there = multiprocessing.Pipe(duplex=False)

    def parent() -> None:
        batches = iter(stream(root, batch_size=2, workers=3))
        there.send([number for _ in range(4) for number in next(batches)["process"].tolist()])
        time.sleep(100)

    running = multiprocessing.get_context("fork").Process(target=parent)
    running.start()
    processes = here.recv()
    running.kill()
    running.join()
    deadline = time.monotonic() + 20
    while any(alive(number) for number in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes and not [number for number in processes if alive(number)]


def alive(process: int) -> bool:
    """Whether it runs: one that ended may still be listed, where nobody waits for it."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# --- evaluation -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (5, 0), (2, 2)])
def test_an_evaluation_takes_every_clip_so_often(root, world, workers):
    ranks = [stream(root, rank, world, shuffle=False, repeats=3, batch_size=world * 4, workers=workers) for rank in range(world)]
    passes = [[told(batch) for batch in one] for one in ranks]
    assert [len(one) for one in passes] == [one.steps_per_epoch for one in ranks]
    clips = [clip for one in passes for batch in one for clip in batch]
    assert sorted(key for key, _ in clips) == sorted(3 * ALL) and len({seed for _, seed in clips}) == len(clips)
    assert sorted(clips) == sorted(clip for batch in stream(root, shuffle=False, repeats=3) for clip in told(batch))


def test_an_evaluation_leaves_out_what_is_refused(root):
    made = stream(root, prepare=Toy(short=("clip_0", "clip_6", "clip_7", "clip_22")), shuffle=False, batch_size=2)
    keys = [batch["keys"] for batch in made]
    assert keys[:3] == [["clip_1"], ["clip_2", "clip_3"], ["clip_4", "clip_5"]] and keys[3] == ["clip_8", "clip_9"]
    assert list(chain.from_iterable(keys)) == [f"clip_{n}" for n in range(CLIPS) if n not in (0, 6, 7, 22)]
    assert made.skipped == 4 and len(keys) == made.steps_per_epoch - 2


# --- where, and of what ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_object_storage_gives_the_same_clips(root, s3, workers):
    for name in storage.names(root):
        storage.write_bytes(f"{s3.url}/{name}", storage.read_bytes(f"{root}/{name}"))
    prepare, values = Toy(short=("clip_8",)), {"block_bytes": 5000, "open_blocks": 2, "lanes": 3}
    here, there = (stream(each, prepare=prepare, workers=workers, **values) for each in (root, s3.url))
    assert [told(batch) for batch in take(there, 9)] == [told(batch) for batch in take(here, 9)]
    assert there.state_dict() == here.state_dict()


def test_clips_that_are_known_to_be_short_are_not_read(root):
    made = stream(root, least_seconds=5.0)
    keys = {key for batch in take(made, 8) for key in batch["keys"]}
    assert keys == {*ALL} - {"clip_4"} and (made.skipped, made.skipped_keys) == (1, ["clip_4"])
    with pytest.raises(ValueError, match="no clip of 11 s; the longest of 22 has 10 s"):
        stream(opened(root).subset(key for key in ALL if key != "clip_7"), least_seconds=11.0)


def test_a_position_belongs_to_its_clips(root, tmp_path):
    state = stream(root).state_dict()
    with pytest.raises(DatasetMismatch, match="samples: 23 there, 22 here"):
        stream(root, state=state, least_seconds=5.0)
    other = dataset(tmp_path / "other", [[clip(n) for n in range(CLIPS)]])
    with pytest.raises(DatasetMismatch, match="content"):
        stream(other, state=state)


def test_clips_that_are_not_alike_are_told(root):
    with pytest.raises(ValueError, match=r"must be prepared alike; clip_0 is .*\[1\].*, and clip_1 is .*\[2\]"):
        list(stream(root, prepare=lambda mp4, *_: {"x": torch.zeros(mp4[0] + 1)}, shuffle=False))


def test_what_offers_no_clips_is_refused(tmp_path):
    create_or_check(tmp_path / "features", new_info("features", {}))
    with pytest.raises(DatasetMismatch, match="is a features dataset; clips are prepared from a media dataset"):
        stream(str(tmp_path / "features"))
    with pytest.raises(ValueError, match=r"least_seconds=-1\.0: expected at least 0"):
        replace(CONFIG, least_seconds=-1.0)
    with pytest.raises(ValueError, match="offers no clips: it has 0 good samples"):
        stream(dataset(tmp_path / "empty", [[Entry("bad", "train", None, "bad.mp4", reason="empty", message="")]]))


def test_a_refusal_can_cross_processes():
    assert str(pickle.loads(pickle.dumps(SkipClip("too short")))) == "too short"
