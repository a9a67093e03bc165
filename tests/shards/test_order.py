"""The order: its definition, what it owes to reading and to shuffling, and which numbers of lanes, batches and ranks go together."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import Order, check_lanes, counter_hash

EXAMPLES = settings(deadline=None, database=None, max_examples=80)


def test_numbers_that_do_not_divide_are_refused_with_the_nearest():
    assert check_lanes(64, None, 1) == 64 and check_lanes(96, None, 3) == 48 and check_lanes(7, None, 7) == 7 and check_lanes(200, None, 1) == 50
    with pytest.raises(ValueError, match=r"batch_size is 64, .* 3 ranks .*: 63 or 66"):
        check_lanes(64, None, 3)
    with pytest.raises(ValueError, match=r"3 ranks .*: 3 or 6"):
        check_lanes(5, None, 3)
    with pytest.raises(ValueError, match=r"48 lanes .* 32 ranks; set lanes to 32 or 96"):
        check_lanes(96, None, 32)
    assert check_lanes(96, 32, 32) == 32


@EXAMPLES
@given(batch=st.integers(1, 300), lanes=st.none() | st.integers(1, 100), world=st.integers(1, 40))
def test_numbers_that_are_named_instead_do_go_together(batch, lanes, world):
    try:
        chosen = check_lanes(batch, lanes, world)
    except ValueError as error:
        offered = re.search(r"nearest that they can: (\d+)(?: or (\d+))?", str(error))
        if offered is not None:
            assert batch % world
            batches = [int(number) for number in offered.groups() if number]
            tried = [None] * len(batches)
            assert min(abs(size - batch) for size in batches) == min(batch % world or world, world - batch % world) or batch < world
        else:
            wanted = re.search(r"set lanes to (\d+)(?: or (\d+))?", str(error))
            assert wanted is not None and batch % world == 0
            tried = [int(number) for number in wanted.groups() if number]
            batches = [batch] * len(tried)
            assert all(batch % number == 0 for number in tried)
        for size, number in zip(batches, tried, strict=True):
            assert size % world == 0
            check_lanes(size, number if number else world, world)
    else:
        assert chosen % world == 0 and batch % world == 0 and (lanes is None or chosen == lanes)


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


@EXAMPLES
@given(st.data())
def test_order_is_its_definition_and_each_sample_comes_once_an_epoch(data):
    samples, lanes, open_blocks = data.draw(st.integers(1, 23)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    blocks = np.sort(data.draw(st.lists(st.integers(0, 5), min_size=samples, max_size=samples)))
    blocks = np.unique(blocks, return_inverse=True)[1]
    seed = data.draw(st.integers(-3, 2**64))
    found = Order(blocks, lanes=lanes, open_blocks=open_blocks, seed=seed).items(np.arange(3 * samples)).tolist()
    assert found == slow_order(blocks, lanes, open_blocks, seed, 3)
    assert all(sorted(found[e * samples : (e + 1) * samples]) == list(range(samples)) for e in range(3))


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
