"""The stream: any rank count, any interruption: the same samples, each once per epoch, and codes that belong to the features' instants."""

import threading
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from shards.dataset import DatasetMismatch, create_or_check, new_info
from shards.order import Order, check_lanes, counter_hash
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig, prefetched
from shards.write import Entry, json_bytes, write_shard

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
            first = int(Fraction(start, 25) * codec["sample_rate_hz"] / codec["hop_samples"])
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


def test_one_sample(tmp_path):
    root = dataset(tmp_path / "set", [[clip(3, 9)]])
    made = stream(root)
    batch = take(made, 1)[0]
    assert batch["keys"] == ["clip_3"] * 12 and len(set(told(batch))) > 4 and made.epoch == 12 and made.steps_per_epoch == 1
    evaluated = list(stream(root, shuffle=False))
    assert len(evaluated) == 1 and evaluated[0]["features"].shape[0] == 1
    assert [len(list(stream(root, rank, 2, shuffle=False))) for rank in range(2)] == [1, 0]


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


def test_numbers_that_do_not_divide_are_refused_with_the_nearest():
    assert check_lanes(64, None, 1) == 64 and check_lanes(96, None, 3) == 48 and check_lanes(7, None, 7) == 7 and check_lanes(200, None, 1) == 50
    with pytest.raises(ValueError, match=r"batch_size is 64, .* 3 ranks .*: 63, 66"):
        check_lanes(64, None, 3)
    with pytest.raises(ValueError, match=r"3 ranks .*: 3, 6"):
        check_lanes(5, None, 3)
    with pytest.raises(ValueError, match=r"48 lanes .* 32 ranks; set lanes to 32 or 96"):
        check_lanes(96, None, 32)
    assert check_lanes(96, 32, 32) == 32


def slow_order(blocks, lanes, open_blocks, seed, epochs):
    """The definition, one sample at a time: positions in turn take the next sample of lane (position mod lanes)."""
    blocks = np.asarray(blocks)
    position, order = 0, []
    for epoch in range(epochs):
        ranking = counter_hash(seed, 0, epoch, np.arange(blocks.max() + 1))
        permuted = sorted(set(blocks.tolist()), key=lambda block: ranking[block])
        dealt = [(place, sample) for place, block in enumerate(permuted) for sample in np.flatnonzero(blocks == block).tolist()]
        share = Counter((position + k) % lanes for k in range(len(blocks)))
        mine = {}
        for lane in range(lanes):
            stretch, dealt = dealt[: share[lane]], dealt[share[lane] :]
            jitter = {sample: int(counter_hash(seed, 1, epoch, np.array([sample]))[0] >> np.uint64(11)) / 2**53 for _, sample in stretch}
            mine[lane] = [sample for _, sample in sorted(stretch, key=lambda pair: pair[0] + open_blocks * jitter[pair[1]])]
        for _ in range(len(blocks)):
            order.append(mine[position % lanes].pop(0))
            position += 1
    return order


@pytest.mark.parametrize(("samples", "lanes", "open_blocks"), [(37, 12, 3), (5, 7, 1), (1, 3, 2), (64, 8, 4), (30, 1, 2)])
def test_order_against_its_definition(samples, lanes, open_blocks):
    blocks = np.sort(np.random.default_rng(samples).integers(0, max(1, samples // 3), samples))
    blocks = np.unique(blocks, return_inverse=True)[1]
    order = Order(blocks, lanes=lanes, open_blocks=open_blocks, seed=11)
    expected = slow_order(blocks, lanes, open_blocks, 11, 4)
    assert order.items(np.arange(4 * samples)).tolist() == expected
    anywhere = np.random.default_rng(1).permutation(4 * samples)
    assert order.items(anywhere).tolist() == [expected[position] for position in anywhere]


def test_a_lane_holds_few_blocks_open():
    """Between a block's first and last sample in a lane, few other blocks are in use: what reading ahead from a store can rely on."""
    samples, per_block, lanes, open_blocks = 6000, 20, 4, 3
    order = Order(np.arange(samples) // per_block, lanes=lanes, open_blocks=open_blocks, seed=1).items(np.arange(samples))
    for lane in range(lanes):
        used = order[lane::lanes] // per_block
        first, last = {}, {}
        for time_used, block in enumerate(used.tolist()):
            first.setdefault(block, time_used)
            last[block] = time_used
        open_at_once = max(sum(first[b] <= now <= last[b] for b in first) for now in range(0, len(used), 7))
        assert 2 <= open_at_once <= open_blocks + 1
        assert len(set(used[:40].tolist())) > 2  # and more than one: they are shuffled together


def test_counter_hash_is_stable_and_even():
    """Values are fixed: a checkpoint's position must mean the same in every version."""
    assert counter_hash(5, 2, 3, np.arange(2)).tolist() == [1291262004622105597, 11682014402152971953]
    bits = np.unpackbits(counter_hash(0, 1, 0, np.arange(20000)).view(np.uint8)).reshape(20000, 64)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.02
    draws = counter_hash(1, 2, np.arange(7000) % 7, np.arange(7000)) % np.uint64(7)
    assert np.abs(np.bincount(draws.astype(int), minlength=7) / 1000 - 1).max() < 0.15


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
    with pytest.raises(ValueError, match="at least 1"):
        stream(root, segments=0)
    with pytest.raises(ValueError, match="prefetch"):
        FeatureStream(Index.open(root), replace(StreamConfig(), prefetch=-1))
