"""How well the stream shuffles, and what memory it takes for that: lanes, open blocks and block lengths against a full shuffle.

`python -m tests.benchmarks.shuffle [samples=200000] [sample_kb=196] [per_shard=1000] [batch_size=64] [ranks=1] [steps=400]`

Of the order alone; nothing is read. `neighbours` is the share of a batch's samples that have their neighbour of the source (the clip before or after,
in one shard) in the same batch, `near` the same of 16 batches together, `entropy` that of the shards in a batch, in bits. The first row is a full
shuffle's. `held_mb` is what one rank holds of a remote dataset at most, all blocks from their first use to their last; the formula for it is
lanes / ranks x open_blocks x block, and with one block more for each lane (`bound_mb`) it is a bound. Prints a table, and one JSON line last.
"""

import json
import sys

import numpy as np

from shards.order import Order
from shards.samples import BLOCKS_PER_LANE
from shards.stream import StreamConfig

OPTIONS = {"samples": 200_000, "sample_kb": 196, "per_shard": 1000, "batch_size": 64, "ranks": 1, "steps": 400}
BATCHES_NEAR = 16
CASES = [
    *[(lanes, 4, 8) for lanes in (8, 16, 32, 64)],
    *[(64, open_blocks, 8) for open_blocks in (1, 2, 8)],
    *[(64, 4, megabytes) for megabytes in (2, 4, 16, 32)],
    (16, 16, 8),
    (16, 2, 8),
    (64, 2, 4),
]
"""Lanes, open blocks, megabytes of a block."""


def main(arguments: list[str]) -> None:
    """Measure, and print one line."""
    options = OPTIONS | {name: int(value) for name, _, value in (argument.partition("=") for argument in arguments)}
    samples, size, steps = options["samples"], options["batch_size"], options["steps"]
    full = np.concatenate([np.random.default_rng(seed).permutation(samples) for seed in range(-(-steps * size // samples))])[: steps * size]
    rows = [{"lanes": None, **mixing(full, options)}]
    rows += [one(lanes, open_blocks, megabytes << 20, options) for lanes, open_blocks, megabytes in CASES if lanes <= size and not size % lanes]
    names = list(rows[-1])
    print(" ".join(f"{name:>12}" for name in names), file=sys.stderr)
    for row in rows:
        print(" ".join(f"{row.get(name, '') if row.get(name) is not None else 'full':>12}" for name in names), file=sys.stderr)
    defaults = StreamConfig()
    print(json.dumps({**options, "default": [defaults.open_blocks, defaults.block_bytes >> 20], "rows": rows}))


def one(lanes: int, open_blocks: int, block_bytes: int, options: dict[str, int]) -> dict[str, float | int | None]:
    """One setting's figures. The blocks are cut as the stream cuts them."""
    samples, bytes_each = options["samples"], options["sample_kb"] << 10
    length = min(block_bytes, samples * bytes_each // (BLOCKS_PER_LANE * lanes))
    shard, within = np.divmod(np.arange(samples), options["per_shard"])
    blocks = np.cumsum(np.diff(np.stack([shard, within * bytes_each // length]), prepend=-1).any(axis=0)) - 1
    order = Order(blocks, lanes=lanes, open_blocks=open_blocks, seed=0).items(np.arange(options["steps"] * options["batch_size"]))
    return {
        "lanes": lanes,
        "open_blocks": open_blocks,
        "block_mb": round(length / 2**20, 1),
        **mixing(order, options),
        "held_mb": round(held(order, blocks, lanes, options["ranks"]) * bytes_each / 2**20),
        "bound_mb": round(lanes / options["ranks"] * (open_blocks + 1) * length / 2**20),
    }


def mixing(order: np.ndarray, options: dict[str, int]) -> dict[str, float]:
    """How mixed the batches of an order are."""
    batches, shards = order.reshape(-1, options["batch_size"]), order.reshape(-1, options["batch_size"]) // options["per_shard"]
    entropies = []
    for batch in shards:
        shares = np.unique(batch, return_counts=True)[1] / len(batch)
        entropies.append(-(shares * np.log2(shares)).sum())
    near = order[: len(order) // (BATCHES_NEAR * options["batch_size"]) * BATCHES_NEAR * options["batch_size"]]
    return {
        "neighbours": round(beside(batches, options["per_shard"]), 5),
        "near": round(beside(near.reshape(-1, BATCHES_NEAR * options["batch_size"]), options["per_shard"]), 4),
        "entropy": round(float(np.mean(entropies)), 3),
    }


def beside(groups: np.ndarray, per_shard: int) -> float:
    """The share of samples that have a neighbour of the source in their group."""
    ordered = np.sort(groups, axis=1)
    follows = (np.diff(ordered, axis=1) == 1) & (ordered[:, 1:] % per_shard != 0)
    ends = np.zeros((len(groups), 1), bool)
    return float((np.hstack([follows, ends]) | np.hstack([ends, follows])).mean())


def held(order: np.ndarray, blocks: np.ndarray, lanes: int, ranks: int) -> int:
    """The most samples that the blocks in use hold together at a time, on the first rank."""
    numbers = np.arange(0, len(order), ranks)
    uses = numbers // len(blocks) * (blocks[-1] + 1) + blocks[order[numbers]]  # in another epoch it is fetched anew
    mine = uses * lanes + numbers % lanes  # a block cut between two lanes is held for each
    pieces, first, number = np.unique(mine, return_index=True, return_inverse=True)
    last = np.zeros(len(pieces), np.int64)
    np.maximum.at(last, number, np.arange(len(mine)))
    sizes = np.bincount(blocks)[pieces // lanes % (blocks[-1] + 1)]
    change = np.zeros(len(mine) + 1, np.int64)
    np.add.at(change, first, sizes)
    np.add.at(change, last + 1, -sizes)
    return int(change.cumsum().max())


if __name__ == "__main__":
    main(sys.argv[1:])
