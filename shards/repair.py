"""Putting a broken dataset right, where what is left of it proves how it was; and removing what is to be made again.

Everything is proven by a sha256 before it takes its place, or, where every record of one is lost, told to be unproven. What is good is not touched.
Knows datasets. Decides by what `shards.check_dataset` found.
"""

from shards.check_dataset import Verified
from shards.write import discard


def repair(verified: Verified) -> list[str]:
    """Puts right what can be, and says what it did, a line each."""
    return []


def redo(verified: Verified) -> None:
    """Removes the broken shards."""
    for name in verified.redo:
        discard(verified.root, name)
