"""Pairs of segments: the segments that were drawn, the same for any ranks and any interruption, and in evaluation every clip that a list names."""

import random
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import storage
from shards.dataset import DatasetMismatch, create_or_check, new_info
from shards.pairs import PairBatch, PairConfig, PairDraw, PairStream
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from shards.write import Entry, write_shard

EXAMPLES = settings(deadline=None, database=None, max_examples=12)
CONFIG = PairConfig(batch_size=12, segments=3, visual_stride=2, audio_stride=5, seed=5, prefetch=0)
TOKENS, VISUAL_WIDTH, AUDIO_WIDTH = 3, 5, 7
SPEC = {"hop_frames": 4, "codec": None, "audio": {"hop_samples": 640}}


def clip(number, visual, audio, *, views=2, audio_views=2, split="train"):
    """Pictures tell (clip, view, segment, token); sound tells (clip, 10 + view, segment, token)."""
    pictures, sound = np.zeros((views, visual, 8, VISUAL_WIDTH), np.float16), np.zeros((audio_views, audio, TOKENS, AUDIO_WIDTH), np.float16)
    for array, first in ((pictures, 0), (sound, 10)):
        array[..., 0], array[..., 1] = number, first + np.arange(len(array))[:, None, None]
        array[..., 2], array[..., 3] = np.arange(array.shape[1])[:, None], np.arange(array.shape[2])
    return Entry(f"clip_{number}", split, None, f"{number}.mp4", members={"avclip.npy": pictures, "avclip_audio.npy": sound, "json": b"{}"})


def dataset(root, shards, spec=SPEC):
    create_or_check(root, new_info("features", spec))
    for number, entries in enumerate(shards):
        write_shard(root, f"train-{number:06d}", entries)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """29 clips in shards of unequal size; the last two are too short for a pair: of pictures the one, of sound the other."""
    numbers = iter(range(27))
    shards = [[clip(n, 5 + n % 4, 11 + n % 6) for _, n in zip(range(size), numbers, strict=False)] for size in (1, 17, 9)]
    return dataset(tmp_path_factory.mktemp("pairs") / "set", [*shards, [clip(27, 4, 30), clip(28, 30, 10)]])


@dataclass(frozen=True)
class Anywhere:
    """Draws a place, and a target that says which: so a batch tells what was drawn. Nothing of the clips named."""

    without: tuple[str, ...] = ()

    def __call__(self, key: str, rng: random.Random, visual: int, audio: int) -> PairDraw | None:
        if key in self.without:
            return None
        first, second = rng.randint(0, visual - 5), rng.randint(0, audio - 11)
        return PairDraw(first, second, 100 * first + second)


opened = lru_cache(Index.open)


def stream(root, rank=0, world=1, *, draw=None, shuffle=True, repeats=1, state=None, **values):
    made = PairStream(
        [opened(each) for each in root] if isinstance(root, list) else opened(root),
        replace(CONFIG, **values),
        rank,
        world,
        draw=draw or Anywhere(),
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


def told(batch: PairBatch):
    """(key, target, view of the pictures, view of the sound) of every pair, once it is certain that its segments are those that were drawn."""
    visual, audio = batch["visual"].float(), batch["audio"].float()
    b = len(batch["keys"])
    assert visual.shape == (b, 3, 8, VISUAL_WIDTH) and audio.shape == (b, 3, TOKENS, AUDIO_WIDTH)
    assert batch["visual"].dtype == batch["audio"].dtype == torch.float16 and batch["target"].dtype == torch.int64
    for half, tokens, stride, first in ((visual, 8, 2, batch["target"] // 100), (audio, TOKENS, 5, batch["target"] % 100)):
        numbers = torch.tensor([int(key.removeprefix("clip_")) for key in batch["keys"]])
        assert (half[..., 0] == numbers[:, None, None]).all() and (half[..., 1] == half[:, :1, :1, 1]).all()
        assert (half[..., 2] == (first[:, None] + stride * torch.arange(3))[..., None]).all()
        assert (half[..., 3] == torch.arange(tokens)).all()
    return list(zip(batch["keys"], batch["target"].tolist(), visual[:, 0, 0, 1].int().tolist(), audio[:, 0, 0, 1].int().tolist(), strict=True))


def whole(keys):
    return sorted(keys) == sorted(f"clip_{n}" for n in range(27))


# --- training -------------------------------------------------------------------------------------------------------------------------


def test_each_clip_once_an_epoch_somewhere_else(root):
    pairs = [pair for batch in take(stream(root), 9 * 9) for pair in told(batch)]
    epochs = [pairs[first : first + 27] for first in range(0, 27 * 36, 27)]
    assert all(whole(key for key, *_ in epoch) for epoch in epochs)
    drawn = {key: {(target, *views) for name, target, *views in pairs if name == key} for key, *_ in epochs[0]}
    possible = {f"clip_{n}": (1 + n % 4) * (1 + n % 6) * 4 for n in range(27)}
    assert all(len(drawn[key]) > 0.4 * min(36, possible[key]) for key in possible)
    for view, among in ((2, {0, 1}), (3, {10, 11})):  # drawn, and apart from each other
        assert {pair[view] for pair in pairs} == among
    assert 0.35 < np.mean([pair[2] == pair[3] - 10 for pair in pairs]) < 0.65
    made = stream(root)
    assert (made.samples, made.skipped, made.skipped_keys, made.steps_per_epoch) == (27, 2, ["clip_27", "clip_28"], 2)


@EXAMPLES
@given(data=st.data(), lanes=st.sampled_from([2, 6, 12]), several=st.integers(1, 3))
def test_any_chain_of_ranks_gives_the_uninterrupted_pairs(root, data, lanes, several):
    values, pairs, state = {"lanes": lanes, "pairs_per_clip": several, "draw": Anywhere(("clip_3", "clip_4", "clip_26"))}, [], None
    for _ in range(data.draw(st.integers(1, 3))):
        world = data.draw(st.sampled_from([ranks for ranks in (1, 2, 3, 4) if lanes % ranks == 0]))
        size, steps = world * data.draw(st.integers(1, 7)), data.draw(st.integers(0, 4))
        ranks = [stream(root, rank, world, state=state, batch_size=size, **values) for rank in range(world)]
        shares = [[pair for batch in take(one, steps) for pair in told(batch)] for one in ranks]
        pairs += [pair for step in zip(*shares, strict=True) for pair in step]
        state = ranks[0].state_dict()
    expected = (pair for batch in stream(root, batch_size=1, **values) for pair in told(batch))
    assert pairs == [pair for _, pair in zip(range(len(pairs)), expected, strict=False)]


def test_threads_and_processes_change_nothing(root):
    expected = [told(batch) for batch in take(stream(root), 5)]
    for values in ({"prefetch": 3}, {"workers": 2}):
        made = stream(root, **values)
        assert [told(batch) for batch in take(made, 3)] == expected[:3] and made.consumed == 36
        assert [told(batch) for batch in take(stream(root, state=made.state_dict()), 2)] == expected[3:]


def test_the_next_clip_takes_the_place_of_one_without_a_pair(root, caplog):
    without = ("clip_5", "clip_6", "clip_26")
    made, untouched = (stream(root, draw=Anywhere(each), run_on=False, batch_size=9, lanes=9) for each in (without, ()))
    pairs, others = ([pair for batch in one for pair in told(batch)] for one in (made, untouched))
    stand_in = {"clip_5": "clip_7", "clip_6": "clip_7", "clip_26": "clip_0"}
    assert [key for key, *_ in pairs] == [stand_in.get(key, key) for key, *_ in others]
    assert [pair for pair, other in zip(pairs, others, strict=True) if other[0] not in stand_in and pair != other] == []
    assert set(made.refused) == set(without) and made.skipped == 5 and made.skipped_keys == ["clip_27", "clip_28", *made.refused]
    assert sorted(record.getMessage().split()[0] for record in caplog.records) == sorted(without)
    places = {(target, *views) for key, target, *views in pairs if key == "clip_7"}
    assert len(places) > 1  # not one pair three times
    with pytest.raises(ValueError, match=r"no pair is to be taken of clip_\d+, nor of the 100 clips after it"):
        take(stream(root, draw=Anywhere(tuple(f"clip_{n}" for n in range(27)))), 1)


def test_a_pair_depends_on_the_clip_and_not_on_what_else_is_there(root):
    """The first time that it is taken, of a subset too."""
    index, few = Index.open(root), ["clip_2", "clip_17", "clip_20"]
    targets = [
        {
            key: target
            for batch in take(PairStream(data, replace(CONFIG, batch_size=3, lanes=1), draw=Anywhere()), steps)
            for key, target, *_ in told(batch)
        }
        for data, steps in ((index, 9), (index.subset(few), 1))
    ]
    assert targets[1] == {key: targets[0][key] for key in few}


# --- evaluation -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 5])
def test_an_evaluation_takes_every_clip_so_often(root, world):
    ranks = [stream(root, rank, world, shuffle=False, repeats=4, batch_size=world * 3) for rank in range(world)]
    passes = [[told(batch) for batch in one] for one in ranks]
    assert [len(one) for one in passes] == [one.steps_per_epoch for one in ranks] and ranks[0].samples == 4 * 27
    pairs = [pair for one in passes for batch in one for pair in batch]
    assert {view for *_, view, _ in pairs} == {0} and {view for *_, view in pairs} == {10}
    assert sorted(pairs) == sorted(pair for batch in stream(root, shuffle=False, repeats=4) for pair in told(batch))
    for repeat in range(4):
        assert whole(key for number, (key, *_) in enumerate(sorted(pairs)) if number % 4 == repeat)
    assert len({target for key, target, *_ in pairs if key == "clip_19"}) > 1
    assert pairs != [pair for batch in stream(root, shuffle=False, repeats=4, seed=6) for pair in told(batch)]


def test_an_evaluation_takes_those_that_a_list_names(root):
    without = ("clip_0", "clip_13")
    made = stream(root, shuffle=False, draw=Anywhere(without), batch_size=4, workers=1)
    keys = [key for batch in made for key in batch["keys"]]
    assert keys == [f"clip_{n}" for n in range(27) if f"clip_{n}" not in without]
    assert (made.samples, made.skipped, made.skipped_keys, made.steps_per_epoch) == (25, 4, ["clip_0", "clip_13", "clip_27", "clip_28"], 7)
    with pytest.raises(ValueError, match="27 clips that are long enough for a pair, and of none of them is one to be taken"):
        stream(root, shuffle=False, draw=Anywhere(tuple(f"clip_{n}" for n in range(27))))


def test_repeats_are_for_evaluation(root):
    for values in ({"repeats": 2}, {"repeats": 0, "shuffle": False}):
        with pytest.raises(ValueError, match=r"repeats=\d.*: expected 1, or more in an evaluation"):
            stream(root, **values)


# --- where, and of what ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{"block_bytes": 3000, "open_blocks": 2}, {"prefetch": 2}])
def test_object_storage_gives_the_same_pairs(root, s3, values):
    for name in storage.names(root):
        storage.write_bytes(f"{s3.url}/{name}", storage.read_bytes(f"{root}/{name}"))
    here, there = (stream(each, draw=Anywhere(("clip_8",)), lanes=3, **values) for each in (root, s3.url))
    assert [told(batch) for batch in take(there, 7)] == [told(batch) for batch in take(here, 7)]
    assert there.state_dict() == here.state_dict()
    assert [told(batch) for batch in stream(s3.url, shuffle=False)] == [told(batch) for batch in stream(root, shuffle=False)]


def test_datasets_mix(root, tmp_path):
    other = dataset(tmp_path / "other", [[clip(50 + n, 6, 12) for n in range(5)]])
    pairs = [pair for batch in take(stream([root, other], weights=[1.0, 2.0]), 10) for pair in told(batch)]
    assert np.mean([int(key.removeprefix("clip_")) >= 50 for key, *_ in pairs]) == pytest.approx(2 / 3, abs=0.05)
    evaluated = [key for batch in stream([root, other], shuffle=False) for key, *_ in told(batch)]
    assert whole(evaluated[:27]) and evaluated[27:] == [f"clip_{50 + n}" for n in range(5)]


def test_longer_clips_alone_where_asked(root):
    made = stream(root, least_visual=8, least_audio=13)
    assert {key for batch in take(made, 3) for key in batch["keys"]} == {f"clip_{n}" for n in range(27) if n % 4 == 3 and n % 6 > 1}
    with pytest.raises(
        ValueError, match=r"expected 31 stored segments of pictures and 11 stored .* of sound; the longest have 30 of pictures and 30 of"
    ):
        stream(root, least_visual=31)


def test_a_position_belongs_to_its_pairs(root):
    state = stream(root).state_dict()
    for values, name in (({"audio_stride": 4}, "audio_stride: 5 there, 4 here"), ({"seed": 6}, "seed"), ({"least_audio": 12}, "least_audio")):
        with pytest.raises(DatasetMismatch, match=name):
            stream(root, state=state, **values)


def test_a_draw_beyond_the_clip_is_an_error_that_names_it(root):
    for drawn, message in (
        (PairDraw(-1, 0, 0), "from segment -1 of pictures"),
        (PairDraw(0, 6, 0), r"clip_\d+: a pair from segment 6 of sound on; it has 1\d, of which a pair spans 11"),
        (PairDraw(0, 0, -1), "target -1"),
    ):
        with pytest.raises(ValueError, match=message):
            take(stream(root, draw=lambda *_, drawn=drawn: drawn), 1)


def test_what_offers_no_pairs_is_refused(tmp_path):
    without = replace(clip(0, 9, 20), members={"avclip.npy": np.zeros((1, 9, 8, 5), np.float16)})
    index = Index.open(dataset(tmp_path / "set", [[without]]))
    with pytest.raises(ValueError, match=r"a sample needs avclip.npy and avclip_audio.npy, .* have avclip.npy; .* where audio.weights are given"):
        PairStream(index, CONFIG, draw=Anywhere())
    mixed = [
        clip(0, 9, 20),
        replace(clip(1, 9, 20), members=dict(clip(1, 9, 20).members or {}) | {"avclip_audio.npy": np.zeros((1, 20, 2, 7), "f2")}),
    ]
    with pytest.raises(ValueError, match=r"alike in all clips; .*\[\[8, 5, 2, 7\], \[8, 5, 3, 7\]\]"):
        PairStream(Index.open(dataset(tmp_path / "mixed", [mixed])), CONFIG, draw=Anywhere())
    create_or_check(tmp_path / "media", new_info("media", {}))
    with pytest.raises(DatasetMismatch, match="soundshard featurise"):
        PairStream(Index.open(tmp_path / "media"), CONFIG, draw=Anywhere())
    with pytest.raises(ValueError, match="audio_stride=0: expected at least 1"):
        replace(CONFIG, audio_stride=0)
    with pytest.raises(ValueError, match="offers no windows"):
        FeatureStream(Index.open(tmp_path / "mixed"), StreamConfig())
