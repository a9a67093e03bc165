"""The stream: any rank count, any interruption: the same samples, each once per epoch, and codes that belong to the features' instants."""

import threading
import time
from dataclasses import replace
from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from shards.dataset import DatasetMismatch, create_or_check, new_info
from shards.read import Index
from shards.samples import prefetched
from shards.stream import FeatureStream, StreamConfig
from shards.write import Entry, json_bytes, write_shard

EXAMPLES = settings(deadline=None, database=None, max_examples=40)
HOP_FRAMES, WIDTH, CODEBOOKS = 8, 5, 3
ENCODEC = {"name": "toy", "sample_rate_hz": 24000, "hop_samples": 320, "codebooks": CODEBOOKS, "card": 1024}
DAC = ENCODEC | {"sample_rate_hz": 44100, "hop_samples": 512}


def clip(number, segments, *, views=2, codec=ENCODEC, short_steps=0, split="train"):
    """Features tell (clip, view, first frame of the segment, token); codes tell (codebook, step)."""
    features = np.zeros((views, segments, 8, WIDTH), np.float16)
    features[..., 0], features[..., 1] = number, np.arange(views)[:, None, None]
    features[..., 2], features[..., 3] = np.arange(segments)[:, None] * HOP_FRAMES, np.arange(8)
    seconds = Fraction(16 + (segments - 1) * HOP_FRAMES, 25)
    steps = int(seconds * codec["sample_rate_hz"] / codec["hop_samples"]) - short_steps
    codes = (np.arange(CODEBOOKS)[:, None] * 10000 + np.arange(steps)).astype(np.uint16)
    return Entry(
        f"clip_{number}", split, None, f"{number}.mp4", members={"avclip.npy": features, "toy.npy": codes, "json": json_bytes({"n": number})}
    )


def dataset(root, shards, codec=ENCODEC):
    create_or_check(root, new_info("features", {"hop_frames": HOP_FRAMES, "views": 2, "codec": codec}))
    for number, entries in enumerate(shards):
        entries = list(entries)
        write_shard(root, f"{entries[0].split}-{number:06d}", entries)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """37 clips in shards of very unequal size, failed rows between them."""
    numbers, shards = iter(range(37)), []
    for size in (1, 23, 2, 11):
        entries = [clip(number, 7 + number % 5) for _, number in zip(range(size), numbers, strict=False)]
        shards.append([*entries, Entry(f"bad.{size}", "train", None, "bad.mp4", reason="empty", message="")])
    return dataset(tmp_path_factory.mktemp("stream") / "set", shards)


def stream(root, rank=0, world=1, *, shuffle=True, state=None, **values):
    made = FeatureStream(
        Index.open(root), StreamConfig(**{"batch_size": 12, "segments": 2, "seed": 5, "prefetch": 0} | values), rank, world, shuffle=shuffle
    )
    if state is not None:
        made.load_state_dict(state)
    return made


def take(made, steps):
    iterator = iter(made)
    batches = [next(iterator) for _ in range(steps)]
    iterator.close()
    return batches


def told(batch):
    """(key, view, first frame, first step) of every window of a batch."""
    f, c = batch["features"], batch["codes"]
    return list(zip(batch["keys"], f[:, 0, 0, 1].int().tolist(), f[:, 0, 0, 2].int().tolist(), c[:, 0, 0].tolist(), strict=True))


def global_batches(root, world, steps, *, states=None, **values):
    """The global batches, put together from the ranks' shares, and the state after them."""
    made = [stream(root, rank, world, state=states, **values) for rank in range(world)]
    shares = [[told(batch) for batch in take(one, steps)] for one in made]
    batches = [sorted(window for share in step for window in share) for step in zip(*shares, strict=True)]
    return batches, made[0].state_dict()


@pytest.mark.parametrize("codec", [ENCODEC, DAC])
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_codes_belong_to_the_features(tmp_path, codec, segments):
    root = dataset(tmp_path / "set", [[clip(n, 5 + n, codec=codec) for n in range(6)]], codec)
    seen = set()
    for batch in take(stream(root, segments=segments), 20):
        features, codes = batch["features"], batch["codes"]
        steps = int(segments * Fraction(16, 25) * codec["sample_rate_hz"] / codec["hop_samples"])
        assert features.shape == (12, segments, 8, WIDTH) and features.dtype == torch.float16
        assert codes.shape == (12, CODEBOOKS, steps) and codes.dtype == torch.int64
        for number, key in enumerate(batch["keys"]):
            start, view = int(features[number, 0, 0, 2]), int(features[number, 0, 0, 1])
            assert (features[number, :, :, 0] == int(key.removeprefix("clip_"))).all() and (features[number, :, :, 1] == view).all()
            assert features[number, :, 0, 2].tolist() == [start + 16 * i for i in range(segments)]  # contiguous segments
            assert features[number, 0, :, 3].tolist() == list(range(8))
            first = int(Fraction(start, 25) * codec["sample_rate_hz"] / codec["hop_samples"] + Fraction(1, 2))  # the nearest
            expected = torch.arange(CODEBOOKS)[:, None] * 10000 + torch.arange(first, first + steps)
            assert torch.equal(codes[number], expected)
            seen.add((key, view, start))
    possible = {(f"clip_{n}", v, 8 * h) for n in range(6) for v in range(2) for h in range(5 + n - 2 * (segments - 1))}
    assert len(seen) > 0.75 * len(possible) and seen <= possible


@pytest.mark.parametrize("world", [2, 3, 4, 6, 12])
def test_every_world_size_gives_the_same_global_batches(root, world):
    one, state = global_batches(root, 1, 11)
    assert global_batches(root, world, 11) == (one, state)
    shares = [take(stream(root, rank, world), 2)[1]["keys"] for rank in range(world)]
    whole = take(stream(root), 2)[1]["keys"]
    assert all(whole[rank::world] == share for rank, share in enumerate(shares))


@pytest.mark.parametrize(("batch_size", "lanes"), [(12, None), (12, 4), (5, None), (64, None), (128, None), (1, None)])
def test_each_sample_exactly_once_per_epoch(root, batch_size, lanes):
    steps = 37 * 3 // batch_size + 2
    keys = [key for batch in take(stream(root, batch_size=batch_size, lanes=lanes), steps) for key in batch["keys"]]
    for epoch in range(len(keys) // 37):
        assert sorted(keys[37 * epoch : 37 * (epoch + 1)]) == sorted(f"clip_{n}" for n in range(37))
    assert len(keys) >= 74 and keys[:37] != keys[37:74]


def test_order_follows_the_seed(root):
    def first(**values):
        return [told(batch) for batch in take(stream(root, **values), 4)]

    assert first() == first() != first(seed=6)
    assert first(prefetch=3) == first()
    assert first(seed=-1) != first(seed=2**63)


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 9])
def test_resume_is_exact_on_another_world_size(root, stop):
    """A chain 3 -> 2 -> 6 -> 1 ranks gives the batches of an uninterrupted run."""
    expected, _ = global_batches(root, 1, stop + 7)
    batches, state = global_batches(root, 3, stop)
    for world, steps in ((2, 1), (6, 4), (1, 2)):
        more, state = global_batches(root, world, steps, states=state)
        batches += more
    assert batches == expected
    assert state["consumed"] == 12 * (stop + 7)


SHAPES = {"one": [1], "fewer shards than ranks": [5, 8], "unequal": [1, 29, 2], "many": [2] * 9}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Datasets of as many clips in as many shards as SHAPES says."""
    made = {}
    for name, sizes in SHAPES.items():
        numbers = iter(range(99))
        shards = [[clip(number, 5) for _, number in zip(range(size), numbers, strict=False)] for size in sizes]
        made[name] = dataset(tmp_path_factory.mktemp("roots") / "set", shards)
    return made


@EXAMPLES
@given(data=st.data(), shape=st.sampled_from(sorted(SHAPES)), lanes=st.sampled_from([1, 2, 6, 12, 24]), several=st.integers(1, 2))
def test_any_chain_of_ranks_and_batch_sizes_gives_the_uninterrupted_samples(roots, data, shape, lanes, several):
    """Stop at any step, go on with any ranks that share the lanes and any batch that they share: the list of samples is the same."""
    values = {"lanes": lanes, "windows_per_clip": several}
    windows, state = [], None
    for _ in range(data.draw(st.integers(1, 4))):
        world = data.draw(st.sampled_from([ranks for ranks in (1, 2, 3, 4, 8) if lanes % ranks == 0]))
        size, steps = world * data.draw(st.integers(1, 7)), data.draw(st.integers(0, 5))
        ranks = [stream(roots[shape], rank, world, state=state, batch_size=size, **values) for rank in range(world)]
        shares = [[window for batch in take(one, steps) for window in told(batch)] for one in ranks]
        windows += chain.from_iterable(zip(*shares, strict=True))
        states = [one.state_dict() for one in ranks]
        state = states[0]
        assert all(other == state for other in states) and state["consumed"] == len(windows)
    expected = chain.from_iterable(map(told, stream(roots[shape], batch_size=1, **values)))
    assert windows == [window for _, window in zip(range(len(windows)), expected, strict=False)]
    clips = sum(SHAPES[shape])
    for epoch in range(len(windows) // (clips * several)):
        keys = [key for key, *_ in windows[epoch * clips * several : (epoch + 1) * clips * several]]
        assert sorted(keys) == sorted(several * [f"clip_{number}" for number in range(clips)])


@EXAMPLES
@given(data=st.data(), shape=st.sampled_from(sorted(SHAPES)), world=st.sampled_from([1, 2, 3, 4, 8]))
def test_evaluation_sees_each_sample_once_on_any_ranks(roots, data, shape, world):
    size = world * data.draw(st.integers(1, 9))
    passes = [list(stream(roots[shape], rank, world, batch_size=size, shuffle=False)) for rank in range(world)]
    assert sorted(key for one in passes for batch in one for key in batch["keys"]) == sorted(f"clip_{n}" for n in range(sum(SHAPES[shape])))
    assert all(0 < len(batch["keys"]) <= size // world for one in passes for batch in one)


@EXAMPLES
@given(data=st.data(), shape=st.sampled_from(sorted(SHAPES)), world=st.sampled_from([1, 2, 3]))
def test_passes_that_end_with_the_epoch_drop_less_than_a_batch(roots, data, shape, world):
    clips = sum(SHAPES[shape])
    values = {"batch_size": world * data.draw(st.integers(1, 5)), "lanes": 6, "run_on": False}
    if clips < values["batch_size"]:
        with pytest.raises(ValueError, match="fewer than batch_size"):
            stream(roots[shape], 0, world, **values)
        return
    stop = data.draw(st.integers(0, clips // values["batch_size"]))
    ranks = [stream(roots[shape], rank, world, **values) for rank in range(world)]
    first = [[batch["keys"] for batch in take(one, stop)] for one in ranks]
    resumed = [stream(roots[shape], rank, world, state=one.state_dict(), **values) for rank, one in enumerate(ranks)]
    finished = stop == clips // values["batch_size"]
    rest = [[] if finished else [batch["keys"] for batch in one] for one in resumed]
    keys = [key for one in (*first, *rest) for batch in one for key in batch]
    assert len(set(keys)) == len(keys) and clips - len(keys) == clips % values["batch_size"]
    assert all(one.consumed == clips and one.epoch == 1 for one in resumed)
    again = [key for one in resumed for batch in one for key in batch["keys"]]
    assert len(set(again)) == len(again) == len(keys) and all(one.consumed == 2 * clips for one in resumed)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
def test_workers_change_nothing(root, workers):
    """Whatever makes the batches: any rank's share of them is the same, and so is the position, which counts what was handed out."""
    values = {"batch_size": 24, "prefetch": 2}
    whole = [told(batch) for batch in take(stream(root, **values), 9)]
    for rank, world in ((0, 1), (1, 2), (2, 3), (3, 4), (7, 8)):
        made = stream(root, rank, world, workers=workers, **values)
        assert [told(batch) for batch in take(made, 4)] == [batch[rank::world] for batch in whole[:4]] and made.consumed == 96
        again = stream(root, rank, world, state=made.state_dict(), workers=4 - workers, **values)
        assert [told(batch) for batch in take(again, 5)] == [batch[rank::world] for batch in whole[4:]]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_evaluate_completely_and_tell_errors(root, workers):
    values = {"shuffle": False, "batch_size": 4}
    assert [told(batch) for batch in stream(root, workers=workers, **values)] == [told(batch) for batch in stream(root, **values)]
    made = stream(root, workers=workers)
    made._indexes[0].shards[0] = "removed-000000"
    made._indexes[0]._maps.clear()
    with pytest.raises(ValueError, match=r"removed-000000\.tar is missing"):
        take(made, 40)


def test_a_loader_around_the_stream(root):
    """PyTorch's DataLoader in the process itself passes batches on; its worker processes would lose the position, and are refused."""
    made, expected = stream(root), [told(batch) for batch in take(stream(root), 3)]
    assert [told(batch) for _, batch in zip(range(3), DataLoader(made, batch_size=None), strict=False)] == expected
    assert made.consumed == 36
    with pytest.raises(ValueError, match="a DataLoader's worker processes"):
        next(iter(DataLoader(stream(root), batch_size=None, num_workers=1)))


@pytest.mark.parametrize("several", [2, 3])
def test_several_windows_of_a_clip_are_near_each_other_and_differ(root, several):
    made = stream(root, windows_per_clip=several, batch_size=1, lanes=1, open_blocks=1, block_bytes=1)
    assert made.samples == 37 * several
    windows = [told(batch)[0] for batch in take(made, 37 * several)]
    places = {}
    for place, (key, *_) in enumerate(windows):
        places.setdefault(key, []).append(place)
    assert len(places) == 37 and all(len(where) == several for where in places.values())
    assert max(max(where) - min(where) for where in places.values()) < 10 * several
    assert len(set(windows)) > 0.8 * len(windows)


def test_a_subset_streams_without_rewriting(root):
    """Sparse picks, by key or by row: windows of exactly these clips, out of the same shards; another position's content."""
    index = Index.open(root)
    picked = index.subset(f"clip_{number}" for number in (30, 2, 3, 17))
    assert picked.keys.to_pylist() == ["clip_2", "clip_3", "clip_17", "clip_30"] and (picked.ok, picked.failed) == (4, 0)
    config = StreamConfig(batch_size=4, segments=2, prefetch=0)
    made = FeatureStream(picked, config)
    batches = take(made, 3)
    assert all(sorted(batch["keys"]) == ["clip_17", "clip_2", "clip_3", "clip_30"] for batch in batches)
    for batch in batches:
        assert batch["features"][:, 0, 0, 0].tolist() == [int(key.removeprefix("clip_")) for key in batch["keys"]]
    assert index.subset(rows=[17, 2, 3, 30, 2]).keys == picked.keys
    with pytest.raises(DatasetMismatch, match="content"):
        FeatureStream(index, config).load_state_dict(made.state_dict())
    with pytest.raises(ValueError, match="no sample with key 'clip_99'"):
        index.subset(["clip_2", "clip_99"])
    with pytest.raises(ValueError, match="samples 0 to 36; asked for 3 to 37"):
        index.subset(rows=[37, 3])
    with pytest.raises(ValueError, match="0 good samples"):
        FeatureStream(index.subset([]), config)


def test_the_batch_size_may_change_in_mid_epoch(root):
    """The order is a list: another batch size cuts it elsewhere, and loses nothing."""
    expected = [window for batch in take(stream(root), 8) for window in told(batch)]
    first = stream(root)
    windows = [window for batch in take(first, 2) for window in told(batch)]
    second = stream(root, batch_size=9, state=first.state_dict())
    assert second.lanes == 12
    windows += [window for batch in take(second, 6) for window in told(batch)]
    assert windows == expected[: len(windows)]
    with pytest.raises(ValueError, match=r"12 lanes, which 8 ranks cannot share; go on with one of \[1, 2, 3, 4, 6, 12\]"):
        stream(root, 0, 8, batch_size=16, state=first.state_dict())


def test_prefetched_batches_are_not_counted(root):
    made = stream(root, prefetch=4)
    iterator = iter(made)
    expected = [told(batch) for batch in take(stream(root), 5)]
    assert [told(next(iterator)) for _ in range(3)] == expected[:3] and made.consumed == 36 and made.epoch == 0
    iterator.close()
    assert [told(batch) for batch in take(made, 2)] == expected[3:] and made.epoch == 1


def test_another_order_is_refused_and_says_why(root, tmp_path):
    state = stream(root).state_dict()
    for values, message in (({"seed": 6}, "seed: 5 there, 6 here"), ({"segments": 3}, "segments: 2"), ({"lanes": 6}, "lanes: 12 there, 6 here")):
        with pytest.raises(DatasetMismatch, match=message):
            stream(root, state=state, **values)
    other = dataset(tmp_path / "other", [[clip(n, 7) for n in range(37)]])
    with pytest.raises(DatasetMismatch, match=r"content: .* there"):
        stream(other, state=state)
    state_of_dac = stream(dataset(tmp_path / "dac", [[clip(0, 7, codec=DAC)]], DAC)).state_dict()
    with pytest.raises(DatasetMismatch, match="fingerprint"):
        stream(root, state=state_of_dac)


def test_moving_the_dataset_keeps_its_positions(tmp_path):
    root = dataset(tmp_path / "here", [[clip(n, 7) for n in range(13)]])
    state = stream(root).state_dict()
    root.rename(tmp_path / "there")
    assert stream(tmp_path / "there", state=state).consumed == 0


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_is_complete_and_padless(root, world):
    made = [stream(root, rank, world, shuffle=False, prefetch=2) for rank in range(world)]
    windows, counts = [], []
    for one in made:
        batches = [told(batch) for batch in one]
        assert len(batches) == one.steps_per_epoch and [told(batch) for batch in one] == batches
        assert all(len(batch) == 12 // world for batch in batches[:-1]) and 0 < len(batches[-1]) <= 12 // world
        counts.append(len(batches))
        windows += [window for batch in batches for window in batch]
    assert sorted(windows) == sorted((f"clip_{n}", 0, 0, 0) for n in range(37))
    assert max(counts) - min(counts) <= 1
    if world == 1:
        assert [key for key, *_ in windows] == Index.open(root).keys.to_pylist()


def test_short_clips_are_left_out_and_counted(tmp_path):
    # With a hop of 8 frames two touching segments need three stored ones; codes a step short of the last window take its start away.
    entries = [clip(0, 2), clip(1, 3), clip(2, 3, short_steps=1), clip(3, 5, short_steps=1), clip(4, 5, short_steps=25)]
    root = dataset(tmp_path / "set", [entries])
    made = stream(root)
    assert (made.samples, made.skipped) == (3, 2)
    starts = {(key, start) for batch in take(made, 30) for key, _, start, _ in told(batch)}
    assert starts == {("clip_1", 0), ("clip_3", 0), ("clip_3", 8), ("clip_4", 0)}
    assert [key for batch in stream(root, shuffle=False) for key in batch["keys"]] == ["clip_1", "clip_3", "clip_4"]
    with pytest.raises(ValueError, match=r"none is as long as a window of 9 segments \(5.76 s\)"):
        stream(root, segments=9)


@pytest.mark.parametrize("codec", [ENCODEC, DAC])
def test_short_clips_are_padded_where_asked(tmp_path, codec):
    entries = [clip(0, 1, codec=codec), clip(1, 2, codec=codec), clip(2, 3, codec=codec), clip(3, 5, short_steps=1, codec=codec)]
    entries += [clip(4, 7, codec=codec), clip(5, 5, codec=codec)]
    root = dataset(tmp_path / "set", [entries], codec)
    made = stream(root, segments=3, batch_size=6, short_clips="pad")
    assert (made.samples, made.skipped, made.padded) == (6, 0, 4)
    assert stream(root, segments=3).skipped == 4
    steps_in = [int(count * Fraction(16, 25) * codec["sample_rate_hz"] / codec["hop_samples"]) for count in range(4)]
    # With a hop of 8 frames, clips of 1 and 2 stored segments hold one after the other 1, of 3 hold 2.
    there = {"clip_0": (1, steps_in[1]), "clip_1": (1, steps_in[1]), "clip_2": (2, steps_in[2]), "clip_3": (3, steps_in[3] - 1)}
    for batch in [*take(made, 5), *stream(root, segments=3, shuffle=False, short_clips="pad")]:
        for number, key in enumerate(batch["keys"]):
            segments, steps = there.get(key, (3, steps_in[3]))
            features, codes = batch["features"][number], batch["codes"][number]
            assert batch["segment_mask"][number].tolist() == [n < segments for n in range(3)]
            assert batch["step_mask"][number].tolist() == [n < steps for n in range(steps_in[3])]
            assert (features[:segments, :, 0] == int(key.removeprefix("clip_"))).all() and not features[segments:].any()
            assert (codes[1, :steps] > 9999).all() and not codes[:, steps:].any()
            assert codes[0, :steps].diff().eq(1).all() and (key not in there or codes[0, 0] == 0)
    assert "segment_mask" not in take(stream(root, segments=3), 1)[0]


def test_one_sample(tmp_path):
    root = dataset(tmp_path / "set", [[clip(3, 9)]])
    made = stream(root)
    batch = take(made, 1)[0]
    assert batch["keys"] == ["clip_3"] * 12 and len(set(told(batch))) > 4 and made.epoch == 12 and made.steps_per_epoch == 1
    evaluated = list(stream(root, shuffle=False))
    assert len(evaluated) == 1 and evaluated[0]["features"].shape[0] == 1
    assert [len(list(stream(root, rank, 2, shuffle=False))) for rank in range(2)] == [1, 0]
    assert [batch["keys"] for batch in stream(root, shuffle=False, workers=2)] == [["clip_3"]]


def test_an_empty_split_is_a_clear_error(tmp_path):
    failed = Entry("a", "val", None, "a", reason="empty", message="")
    root = dataset(tmp_path / "set", [[clip(0, 5)], [failed]])
    with pytest.raises(ValueError, match=r"offers no windows: .* 0 good samples"):
        FeatureStream(Index.open(root, "val"), StreamConfig())
    create_or_check(tmp_path / "media", new_info("media", {}))
    with pytest.raises(DatasetMismatch, match="soundshard featurise"):
        FeatureStream(Index.open(tmp_path / "media"), StreamConfig())


def test_codebooks_must_be_those_of_the_spec(tmp_path):
    root = dataset(tmp_path / "set", [[clip(0, 5)]], ENCODEC | {"codebooks": 4})
    with pytest.raises(ValueError, match=r"with 4 codebooks .* \[\[8, 5, 3\]\]"):
        stream(root)


def test_shuffling_mixes_a_small_set(root):
    """Over epochs a sample's neighbours in a batch are many, though blocks are contiguous runs."""
    met = {number: set() for number in range(37)}
    for batch in take(stream(root), 90):
        numbers = [int(key.removeprefix("clip_")) for key in batch["keys"]]
        for number in numbers:
            met[number] |= set(numbers)
    assert min(len(others) for others in met.values()) > 30


def test_prefetching_ends_with_its_iterator():
    def threads():
        return [t for t in threading.enumerate() if t.name == "soundshard-prefetch"]

    made = []

    def numbers():
        for number in range(100):
            made.append(number)
            yield number

    assert list(prefetched(iter(range(7)), 3)) == list(range(7)) and not threads()
    iterator = prefetched(numbers(), 3)
    assert next(iterator) == 0 and len(threads()) == 1
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4  # one handed out, three waiting
    iterator.close()
    assert not threads()


def test_errors_in_the_thread_are_raised_to_the_consumer(root):
    made = stream(root, prefetch=2)
    made._indexes[0].shards[0] = "removed-000000"
    made._indexes[0]._maps.clear()
    with pytest.raises(ValueError, match=r"removed-000000\.tar is missing"):
        take(made, 40)
    assert not [t for t in threading.enumerate() if t.name == "soundshard-prefetch"]


def test_bad_values_are_refused(root):
    with pytest.raises(ValueError, match="segments=0: expected at least 1"):
        stream(root, segments=0)
    with pytest.raises(ValueError, match="no dataset"):
        FeatureStream([], StreamConfig())
    with pytest.raises(ValueError, match="prefetch"):
        FeatureStream(Index.open(root), replace(StreamConfig(), prefetch=-1))
