"""Mixtures: the weights hold in any prefix and in every batch, each dataset keeps its own epochs, and a number still says all."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.dataset import DatasetMismatch
from shards.order import SHARES, Mixture
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from tests.shards.test_stream import DAC, clip, dataset, take, told

EXAMPLES = settings(deadline=None, database=None, max_examples=40)
WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6)
FIRST, SECOND = 19, 8
"""Clips of the two datasets: clip_0 to clip_18, and clip_50 to clip_57."""


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return [
        dataset(folder / "first", [[clip(n, 5 + n % 3) for n in range(7)], [clip(n, 6) for n in range(7, FIRST)]]),
        dataset(folder / "second", [[clip(50 + n, 4) for n in range(SECOND)]]),
    ]


def mixed(roots, rank=0, world=1, *, shuffle=True, state=None, **values):
    config = StreamConfig(**{"batch_size": 12, "segments": 2, "seed": 5, "prefetch": 0, "weights": [3.0, 1.0]} | values)
    made = FeatureStream([Index.open(root) for root in roots], config, rank, world, shuffle=shuffle)
    if state is not None:
        made.load_state_dict(state)
    return made


def of_second(key):
    return int(key.removeprefix("clip_")) >= 50


# --- the rule -------------------------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(weights=WEIGHTS, lanes=st.integers(1, 24), far=st.integers(0, 2**34))
def test_a_number_says_its_list_and_its_place_there(weights, lanes, far):
    """Anywhere in the order: in each lane, a list's places follow one another, and all lists' places begin at 0."""
    mixture, rows = Mixture(weights, lanes=lanes), 40
    for first in (0, far * lanes):
        numbers = np.arange(first, first + rows * lanes)
        lists, places = mixture.places(numbers)
        assert (places % lanes == numbers % lanes).all()
        before, after = mixture.counts(first), mixture.counts(first + len(numbers))
        assert sum(before) == first and sum(after) == first + len(numbers)
        for each in range(len(weights)):
            assert np.count_nonzero(lists == each) == after[each] - before[each]
            for lane in range(lanes):
                turns = places[lane::lanes][lists[lane::lanes] == each] // lanes
                assert (np.diff(turns) == 1).all() and (first or not len(turns) or turns[0] == 0)


@EXAMPLES
@given(weights=WEIGHTS, lanes=st.sampled_from([1, 6, 48, 64]))
def test_any_prefix_keeps_the_weights(weights, lanes):
    """Within a few samples, for ever; so does a batch of all lanes."""
    mixture = Mixture(weights, lanes=lanes)
    assert np.allclose(np.array(mixture.shares) / sum(mixture.shares), np.array(weights) / sum(weights), atol=2 / SHARES)
    lists, _ = mixture.places(np.arange(300 * lanes))
    drawn = np.stack([(lists == each).cumsum() for each in range(len(weights))])
    due = np.outer(np.array(mixture.shares) / sum(mixture.shares), np.arange(1, 300 * lanes + 1))
    assert np.abs(drawn - due).max() <= 3 * len(weights)
    batches = np.diff(drawn[:, lanes - 1 :: lanes], prepend=0)
    assert np.abs(batches - due[:, lanes - 1 : lanes]).max() <= 3 * len(weights)


def test_one_list_is_every_number():
    lists, places = Mixture([0.3], lanes=7).places(np.arange(100))
    assert not lists.any() and places.tolist() == list(range(100))


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="expected a positive number for each dataset"):
        Mixture(weights, lanes=4)


# --- the stream -----------------------------------------------------------------------------------------------------------------------


def test_each_dataset_keeps_its_share_and_its_own_epochs(roots):
    made = mixed(roots)
    batches = take(made, 76)
    for batch in batches:
        assert 8 <= sum(not of_second(key) for key in batch["keys"]) <= 10
        assert batch["features"][:, 0, 0, 0].tolist() == [int(key.removeprefix("clip_")) for key in batch["keys"]]
        assert torch.equal(batch["codes"][:, 1, 0], 10000 + batch["codes"][:, 0, 0])
    keys = [key for batch in batches for key in batch["keys"]]
    for numbers, share in ((range(FIRST), 0.75), (range(50, 50 + SECOND), 0.25)):
        mine = [key for key in keys if int(key.removeprefix("clip_")) in numbers]
        assert len(mine) == pytest.approx(share * len(keys), abs=3)
        times = Counter(mine)
        assert set(times) == {f"clip_{n}" for n in numbers} and max(times.values()) - min(times.values()) <= 2
    assert made.epochs == pytest.approx([0.75 * len(keys) / FIRST, 0.25 * len(keys) / SECOND], abs=0.3)


def test_without_weights_each_clip_comes_as_often(roots):
    made = mixed(roots, weights=None)
    assert made.samples == FIRST + SECOND
    times = Counter(key for batch in take(made, 9 * 5) for key in batch["keys"])
    assert len(times) == FIRST + SECOND and max(times.values()) - min(times.values()) <= 2


def test_the_first_dataset_alone_is_the_same_order(roots):
    """A dataset in a list by itself is that dataset: positions saved before another is added are its own."""
    alone = FeatureStream(Index.open(roots[0]), StreamConfig(batch_size=12, segments=2, seed=5))
    listed = FeatureStream([Index.open(roots[0])], StreamConfig(batch_size=12, segments=2, seed=5))
    assert alone.state_dict() == listed.state_dict()
    assert [told(batch) for batch in take(alone, 5)] == [told(batch) for batch in take(listed, 5)]


@settings(EXAMPLES, max_examples=20)
@given(data=st.data(), weights=st.none() | st.lists(st.sampled_from([0.2, 1.0, 3.0, 7.0]), min_size=2, max_size=2))
def test_any_chain_of_ranks_gives_the_uninterrupted_mixture(roots, data, weights):
    windows, state = [], None
    for _ in range(data.draw(st.integers(1, 3))):
        world = data.draw(st.sampled_from([1, 2, 3, 4]))
        size, steps = world * data.draw(st.integers(1, 7)), data.draw(st.integers(0, 5))
        ranks = [mixed(roots, rank, world, state=state, batch_size=size, lanes=12, weights=weights) for rank in range(world)]
        shares = [[window for batch in take(one, steps) for window in told(batch)] for one in ranks]
        windows += chain.from_iterable(zip(*shares, strict=True))
        state = ranks[0].state_dict()
    expected = chain.from_iterable(map(told, mixed(roots, batch_size=1, lanes=12, weights=weights)))
    assert windows == [window for _, window in zip(range(len(windows)), expected, strict=False)]


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_goes_through_one_after_the_other(roots, world):
    passes = [[told(batch) for batch in mixed(roots, rank, world, shuffle=False, batch_size=6)] for rank in range(world)]
    windows = [window for one in passes for batch in one for window in batch]
    assert sorted(windows) == sorted((f"clip_{n}", 0, 0, 0) for n in [*range(FIRST), *range(50, 50 + SECOND)])
    if world == 1:
        assert [of_second(key) for key, *_ in windows] == FIRST * [False] + SECOND * [True]


def test_workers_and_padding_mix_too(roots):
    expected = take(mixed(roots, segments=3, short_clips="pad"), 4)
    for made, batch in zip(take(mixed(roots, segments=3, short_clips="pad", workers=2), 4), expected, strict=True):
        assert made["keys"] == batch["keys"] and all(torch.equal(made[name], batch[name]) for name in ("features", "codes", "step_mask"))
    padded = [bool((~mask).any()) for batch in expected for mask in batch["step_mask"]]
    assert padded == [of_second(key) for batch in expected for key in batch["keys"]]


def test_places_mix(roots, s3):
    """One dataset on disk and one in object storage, read by a thread or by a process, give what they give on disk."""
    elsewhere = dataset(s3.url, [[clip(50 + n, 4) for n in range(SECOND)]])
    expected = [told(batch) for batch in take(mixed(roots), 5)]
    for values in ({"prefetch": 2}, {"workers": 1}):
        made = mixed([roots[0], elsewhere], **values)
        assert [told(batch) for batch in take(made, 5)] == expected
        assert made.state_dict() == mixed(roots).state_dict() | {"consumed": 60}


def test_subsets_mix(roots):
    first, second = (Index.open(root) for root in roots)
    made = FeatureStream([first.subset(["clip_3", "clip_11"]), second.subset(rows=[7])], StreamConfig(batch_size=6, segments=2, lanes=3))
    assert {key for batch in take(made, 6) for key in batch["keys"]} == {"clip_3", "clip_11", "clip_57"}


# --- what is refused ------------------------------------------------------------------------------------------------------------------


def test_what_was_made_otherwise_is_not_mixed(roots, tmp_path):
    other = dataset(tmp_path / "dac", [[clip(0, 7, codec=DAC)]], DAC)
    with pytest.raises(DatasetMismatch, match=r"(?s)cannot be mixed.*spec\.codec\.hop_samples: 320 in the one, 512 in the other"):
        mixed([roots[0], other])


def test_weights_are_one_for_each_dataset(roots):
    with pytest.raises(ValueError, match=r"3 weights for 2 datasets"):
        mixed(roots, weights=[1.0, 2.0, 3.0])


def test_a_position_belongs_to_its_mixture(roots, tmp_path):
    state = mixed(roots).state_dict()
    assert mixed(roots, weights=[6.0, 2.0], state=state).consumed == 0
    with pytest.raises(DatasetMismatch, match=r"data\[0\]\.share: 786432 there, 524288 here"):
        mixed(roots, weights=[1.0, 1.0], state=state)
    with pytest.raises(DatasetMismatch, match=r"data\[0\]\.content"):
        mixed(roots[::-1], weights=[3.0, 1.0], state=state)
    alone = FeatureStream(Index.open(roots[0]), StreamConfig(batch_size=12, segments=2, seed=5))
    with pytest.raises(DatasetMismatch, match=r"fingerprint: None there"):
        alone.load_state_dict(state)
    moved = [dataset(tmp_path / "elsewhere", [[clip(n, 5 + n % 3) for n in range(7)], [clip(n, 6) for n in range(7, FIRST)]]), roots[1]]
    assert mixed(moved, state=state).consumed == 0
