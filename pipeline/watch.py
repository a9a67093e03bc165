"""Noticing nodes that have stopped without dying: a sentinel on every node must answer a ping, or its node counts as frozen.

Ray's own health check takes minutes with its defaults before work on a frozen node starts again elsewhere; this takes `freeze_seconds`. Knows
nothing of shards: what to do about a frozen node is the loop's matter.
"""

import os
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Actor = Any
"""A Ray actor's handle, for which Ray has no type that its own functions accept."""
PING_SECONDS = 5.0
LIST_SECONDS = 10.0


class Sentinel:
    """An actor that does nothing but answer."""

    def ping(self) -> int:
        """The process's number."""
        return os.getpid()


@dataclass
class _Watched:
    """A node under watch: its sentinel, the ping that is under way and since when."""

    sentinel: Actor
    ping: ray.ObjectRef
    asked: float
    answered: bool = False
    """Whether the ping under way has come back."""


class Watch:
    """The nodes of the cluster, the driver's own excepted: if that one stops, so does this."""

    def __init__(self, freeze_seconds: float) -> None:
        self._freeze_seconds = freeze_seconds
        self._own = ray.get_runtime_context().get_node_id()
        self._nodes: dict[str, _Watched] = {}
        self._listed = -LIST_SECONDS
        self.frozen: set[str] = set()
        self.gone: list[str] = []
        """Nodes that have left since this was last emptied. Ray itself does their work again."""

    def poll(self) -> set[str]:
        """Nodes found frozen since the last call. Takes no longer than a look at what has arrived."""
        now = time.monotonic()
        if now - self._listed >= LIST_SECONDS:
            self._listed = now
            self._list(now)
        fresh: set[str] = set()
        for node, watched in self._nodes.items():
            if not watched.answered and ray.wait([watched.ping], timeout=0)[0]:
                watched.answered = True
                try:
                    ray.get(watched.ping, timeout=1)
                    self.frozen.discard(node)
                except (RayError, GetTimeoutError):
                    watched.sentinel = _sentinel(node)  # killed on its own; if the node is gone, the next listing says so
            if watched.answered and now - watched.asked >= PING_SECONDS:
                watched.ping, watched.asked, watched.answered = watched.sentinel.ping.remote(), now, False
            elif not watched.answered and now - watched.asked > self._freeze_seconds and node not in self.frozen:
                fresh.add(node)
        self.frozen |= fresh
        return fresh

    def close(self) -> None:
        """End the sentinels."""
        for watched in self._nodes.values():
            ray.kill(watched.sentinel)
        self._nodes.clear()

    def _list(self, now: float) -> None:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {self._own}
        for node in set(self._nodes) - alive:  # dead for Ray too, which repeats its work elsewhere
            del self._nodes[node]
            self.gone.append(node)
            self.frozen.discard(node)
        for node in alive - set(self._nodes):
            sentinel = _sentinel(node)
            self._nodes[node] = _Watched(sentinel, sentinel.ping.remote(), now)


def _sentinel(node: str) -> Actor:
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(Sentinel).options(num_cpus=0, scheduling_strategy=place).remote()
