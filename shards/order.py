"""The endless order of samples for training: which sample is number g, from the seed and the blocks alone.

Epoch e is the numbers [e * N, (e + 1) * N): each sample exactly once in it. Number g belongs to lane g mod L, whatever the batch size and the
number of ranks. In every epoch the blocks (contiguous runs of samples in a shard) are permuted and dealt to the lanes one after the other, in shares
that differ by one sample at most (so L - 1 cuts may go through a block), and each lane shuffles its samples among the few blocks it has open. Because
the shares follow from g, lanes need no padding and run on across epochs in step.

Several lists are mixed by weight: every lane deals its turns to them (`Mixture`), so that each list has the same lanes and an epoch of its own, and
the number alone still says which list and which place in it.

Knows numbers only: no dataset, no tensors.
"""

import math
from collections.abc import Sequence

import numpy as np

MAX_LANES = 64
BLOCKS, SHUFFLE, START, VIEW, LIST, DRAW, AUDIO_VIEW = range(7)
"""What a draw is for: keys of the counter-based generator."""
SHARES = 2**20
"""The resolution of a mixture's weights: its shares are whole numbers of about this sum."""
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


class Order:
    """The endless order of samples (see the module's docstring), by position: any part of it can be had without what comes before."""

    def __init__(self, blocks: np.ndarray, *, lanes: int, open_blocks: int, seed: int) -> None:
        """`blocks` is the block of every sample, ascending from 0."""
        self._blocks, self._lanes, self._open_blocks, self._seed = blocks, lanes, open_blocks, seed
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self._blocks)

    def items(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions."""
        samples, found = len(self._blocks), np.empty_like(positions)
        epochs = positions // samples
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            if epoch not in self._epochs:
                self._epochs = dict(list(self._epochs.items())[-1:]) | {epoch: self._epoch(epoch)}
            order, begins = self._epochs[epoch]
            lane, within = positions[here] % self._lanes, positions[here] - epoch * samples
            found[here] = order[begins[lane] + within // self._lanes]
        return found

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's samples, lane after lane, and where each lane begins."""
        samples, blocks = len(self._blocks), self._blocks
        # The lane of the epoch's first position, and so of every one, follows from all samples before it.
        ahead = (np.arange(self._lanes) - epoch * samples) % self._lanes
        lengths = (samples - ahead + self._lanes - 1) // self._lanes
        place = np.empty(blocks[-1] + 1, np.int64)
        place[np.argsort(counter_hash(self._seed, BLOCKS, epoch, np.arange(len(place))), kind="stable")] = np.arange(len(place))
        dealt = np.argsort(place[blocks], kind="stable")
        # A sample of a lane's k-th block is used at a time drawn from [k, k + open_blocks): at any time so many blocks are open.
        jitter = (counter_hash(self._seed, SHUFFLE, epoch, dealt) >> np.uint64(11)) * 2.0**-53
        time = place[blocks[dealt]] + self._open_blocks * jitter
        lane = np.repeat(np.arange(self._lanes), lengths)
        return dealt[np.lexsort((time, lane))], np.cumsum(lengths) - lengths


class Mixture:
    """Deals the numbers 0, 1, 2, ... to several lists by weight, and says which place in which list a number is, with nothing to remember.

    Lane l has turn t at number t * L + l, and its n-th turn for a list is the list's place n * L + l: so a rank's lanes are its lanes in every list.
    Of its first t turns a lane gives (t * share + phase) // rest to the first list; what is left is dealt to the others in the same way. Phases are
    spread over the lanes evenly (multiples of the square root of a prime, another one for each list), so a batch has the weights, too.
    """

    def __init__(self, weights: Sequence[float], *, lanes: int) -> None:
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"weights are {list(weights)}; expected a positive number for each dataset")
        self._lanes = lanes
        self.shares = [max(1, round(weight / sum(weights) * SHARES)) for weight in weights]
        rests = [sum(self.shares[number:]) for number in range(len(self.shares))]
        roots = [math.isqrt(PRIMES[number % len(PRIMES)] << 128) % 2**64 for number in range(len(rests))]
        self._phases = [
            np.array([(lane * root % 2**64 * rest) >> 64 for lane in range(lanes)], np.int64) for root, rest in zip(roots, rests, strict=True)
        ]
        self._rests = rests

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The list of each number, and the place in it."""
        turn, lane = positions // self._lanes, positions % self._lanes
        before = self._turns(turn, lane)
        chosen = (self._turns(turn + 1, lane) - before).argmax(axis=0)
        return chosen, np.take_along_axis(before, chosen[None], axis=0)[0] * self._lanes + lane

    def counts(self, positions: int) -> list[int]:
        """How many of the numbers below this one each list has."""
        lane = np.arange(self._lanes)
        return self._turns((positions - lane + self._lanes - 1) // self._lanes, lane).sum(axis=1).tolist()

    def _turns(self, turns: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """Of its first `turns` turns, how many a lane gives to each list."""
        given = np.empty((len(self.shares), *turns.shape), np.int64)
        for number, (share, rest, phases) in enumerate(zip(self.shares, self._rests, self._phases, strict=True)):
            given[number] = (turns * share + phases[lane]) // rest
            turns = turns - given[number]
        return given


def check_lanes(batch_size: int, lanes: int | None, world: int) -> int:
    """The number of lanes, chosen if None, once it is certain that `world` ranks can share them and the batch. ValueError with the nearest."""
    if batch_size % world:
        below = batch_size // world * world
        nearest = f"{below} or {below + world}" if below else f"{world}"
        raise ValueError(f"batch_size is {batch_size}, which {world} ranks cannot share; the nearest that they can: {nearest}")
    chosen = lanes or max(number for number in range(1, min(MAX_LANES, batch_size) + 1) if batch_size % number == 0)
    if chosen % world:
        fitting = [number for number in range(world, batch_size + 1, world) if batch_size % number == 0]
        nearest = sorted(sorted(fitting, key=lambda number: abs(number - chosen))[:2])
        raise ValueError(
            f"{chosen} lanes{'' if lanes else f' (chosen for batch_size {batch_size})'} cannot be shared by {world} ranks; set lanes to "
            f"{' or '.join(map(str, nearest))}, which also divide the batch (the order of samples depends on the lanes: keep them for the whole run)"
        )
    return chosen


def counter_hash(seed: int, purpose: int, epochs: int | np.ndarray, items: np.ndarray) -> np.ndarray:
    """64 random bits for each (seed, purpose, epoch, item), with no state: SplitMix64's output function per key (Steele et al. 2014)."""
    bits = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for word in (np.array(seed % 2**64, np.uint64), np.array(purpose), np.asarray(epochs), items):
            bits = (bits ^ word.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits
