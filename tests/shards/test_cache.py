"""The cache of ranges: what it holds is what was put there, never more than its limit, whoever shares it and however they end."""

import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from configs import storage
from shards import cache as cache_module
from shards.cache import COUNT, RangeCache
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from tests.s3 import Faults
from tests.shards.test_blocks import SMALL, assert_equal, local, reads, remote, stream, take  # noqa: F401 - two fixtures

FOUND = storage.Stat("s3://bucket/x.tar", 10_000, "etag:1")


def data(number, size=1000):
    return np.full(size, number, np.uint8)


def files(folder):
    return sorted(path for path in Path(folder).iterdir() if path.name != COUNT)


def held(folder):
    return sum(path.stat().st_size for path in files(folder))


def age(folder, seconds):
    for number, path in enumerate(files(folder)):
        os.utime(path, (time.time() - seconds + number,) * 2)


def test_what_is_put_is_found_by_object_version_and_range(tmp_path):
    cache = RangeCache(tmp_path / "a" / "b", 10_000)
    cache.put(FOUND, 500, data(1))
    cache.put(FOUND, 1500, data(2, 7))
    for other in (cache, RangeCache(tmp_path / "a" / "b", 10_000)):
        found, second = other.get(FOUND, 500, 1500), other.get(FOUND, 1500, 1507)
        assert found is not None and second is not None and found.tolist() == [1] * 1000 and second.tolist() == [2] * 7
    changed = storage.Stat(FOUND.path, FOUND.size, "etag:2")
    elsewhere = storage.Stat("s3://bucket/y.tar", FOUND.size, FOUND.version)
    assert [cache.get(*key) for key in ((changed, 500, 1500), (elsewhere, 500, 1500), (FOUND, 500, 1499), (FOUND, 0, 1000))] == [None] * 4
    with pytest.raises(ValueError, match="expected a folder on a local disk"):
        RangeCache("s3://bucket/cache", 1000)


def test_a_file_that_was_damaged_is_not_used(tmp_path):
    cache = RangeCache(tmp_path, 10_000)
    cache.put(FOUND, 0, data(1))
    for size in (999, 0):
        os.truncate(files(tmp_path)[0], size)
        assert cache.get(FOUND, 0, 1000) is None
    cache.put(FOUND, 0, data(1))
    found = cache.get(FOUND, 0, 1000)
    assert found is not None and found.tolist() == [1] * 1000


def test_what_is_stale_makes_room_longest_unused_first_and_what_is_used_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "FULL_SECONDS", 0.0)
    cache = RangeCache(tmp_path, 5500)
    for number in range(5):
        cache.put(FOUND, 1000 * number, data(number))
    cache.put(FOUND, 5000, data(5))
    assert cache.get(FOUND, 5000, 6000) is None and held(tmp_path) == 5000  # all are in use: nothing is added
    for number in range(5):
        path = cache._path(FOUND, 1000 * number, 1000 * number + 1000)
        os.utime(path, (time.time() - 2 * cache_module.STALE_SECONDS + number,) * 2)
    mapped = cache.get(FOUND, 0, 1000)  # used just now; and what is removed can be read on
    second = np.memmap(cache._path(FOUND, 1000, 2000), mode="r", dtype=np.uint8)
    cache.put(FOUND, 5000, data(5))
    there = [cache.get(FOUND, 1000 * number, 1000 * number + 1000) is not None for number in range(6)]
    assert there == [True, False, False, True, True, True] and held(tmp_path) == 4000
    assert mapped is not None and mapped.tolist() == [0] * 1000 and second.tolist() == [1] * 1000


def test_the_limit_holds_among_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "FULL_SECONDS", 0.0)
    caches, seen = [RangeCache(tmp_path, 20_500) for _ in range(3)], []

    def put(number):
        caches[number % 3].put(FOUND, 1000 * number, data(number % 251))
        with caches[0]._locked():
            seen.append(held(tmp_path))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(put, range(100)))
        age(tmp_path, 2 * cache_module.STALE_SECONDS)
        list(pool.map(put, range(100, 200)))
    assert max(seen) <= 20_500 and 17_000 <= held(tmp_path) == int((tmp_path / COUNT).read_bytes())


def test_what_a_crash_leaves_is_cleared(tmp_path):
    cache = RangeCache(tmp_path, 5500)
    cache.put(FOUND, 0, data(1))
    # Killed while it wrote: counted, and under a temporary name.
    left = tmp_path / f".{cache._path(FOUND, 1000, 4000).name}.0123456789ab.tmp"
    left.write_bytes(bytes(3000))
    (tmp_path / COUNT).write_bytes(b"4000")
    again = RangeCache(tmp_path, 5500)
    assert files(tmp_path) == [cache._path(FOUND, 0, 1000)] and (tmp_path / COUNT).read_bytes() == b"1000"
    # Killed between emptying the count and writing it, or before it wrote what it had counted.
    for count in (b"", b"5400"):
        (tmp_path / COUNT).write_bytes(count)
        again.put(FOUND, 1000 + len(count), data(2))
    assert held(tmp_path) == 3000 == int((tmp_path / COUNT).read_bytes())


def test_a_folder_that_fails_is_done_without(tmp_path, local, remote, caplog):  # noqa: F811
    folder = tmp_path / "cache"
    made = stream(remote, cache_dir=str(folder))
    with_cache = take(made, 3)
    batches = iter(made)
    with_cache.append(next(batches))
    folder.rename(tmp_path / "gone")
    with_cache += [next(batches) for _ in range(8)]
    batches.close()
    assert_equal(with_cache, take(stream(local), 12))
    assert sum("cannot keep what was fetched, going on without" in record.message for record in caplog.records) == 1


def test_threads_that_find_a_folder_failing_together_say_so_once(tmp_path, caplog):
    cache = RangeCache(tmp_path / "cache", 10**6)
    slow_log = logging.Handler()
    slow_log.emit = lambda _record: time.sleep(0.2)  # so that the second finds it out while the first still says so
    cache_module.log.addHandler(slow_log)
    with ThreadPoolExecutor(4) as pool, cache._locked():
        puts = [pool.submit(cache.put, FOUND, number, data(number)) for number in range(4)]
        time.sleep(0.2)  # they wait for the lock now
        (tmp_path / "cache").rename(tmp_path / "gone")
    cache_module.log.removeHandler(slow_log)
    assert [put.result() for put in puts] == [None] * 4
    assert sum("cannot keep what was fetched" in record.message for record in caplog.records) == 1


def test_streams_that_share_a_failing_folder_say_so_once(tmp_path, caplog):
    """A stream that was left may still be fetching when the next one has begun."""
    left, next_one = (RangeCache(tmp_path / "cache", 10**6) for _ in range(2))
    (tmp_path / "cache").rename(tmp_path / "gone")
    left.put(FOUND, 0, data(0))
    next_one.put(FOUND, 1, data(1))
    assert sum("cannot keep what was fetched" in record.message for record in caplog.records) == 1
    again = RangeCache(tmp_path / "cache", 10**6)  # which makes the folder anew
    again.put(FOUND, 2, data(2))
    assert len(files(tmp_path / "cache")) == 1
    (tmp_path / "cache").rename(tmp_path / "gone_too")
    again.put(FOUND, 3, data(3))
    assert sum("cannot keep what was fetched" in record.message for record in caplog.records) == 2


# --- with the stream -------------------------------------------------------------------------------------------------------------------


def test_a_second_epoch_is_read_from_the_cache(tmp_path, local, remote, flaky_s3):  # noqa: F811
    proxy = flaky_s3(Faults())
    expected = take(stream(local), 18)
    assert_equal(take(stream(remote, cache_dir=str(tmp_path)), 18), expected)
    before = reads(proxy).total()
    assert_equal(take(stream(remote, cache_dir=str(tmp_path)), 18), expected)
    assert before > 20 and reads(proxy).total() == before
    # An object that changed is not taken from there.
    name = next(name for name in storage.names(local) if name.endswith(".tar"))
    storage.write_bytes(f"{remote}/{name}", storage.read_bytes(f"{local}/{name}") + bytes(512))
    assert_equal(take(stream(remote, cache_dir=str(tmp_path)), 18), expected)
    assert before < reads(proxy).total() < 2 * before


PROCESS = """
import json, sys
from hashlib import sha256
from tests.shards.test_cache import digest
print(json.dumps(digest(sys.argv[1], cache_dir=sys.argv[2], cache_gb=float(sys.argv[3]))))
"""


def digest(root, **values):
    """Hashes of the batches of three epochs."""
    batches = take(FeatureStream(Index.open(root), StreamConfig(**SMALL | values)), 15)
    return [sha256(batch["features"].numpy().tobytes() + batch["codes"].numpy().tobytes()).hexdigest() for batch in batches]


def test_processes_share_a_cache(tmp_path, local, remote):  # noqa: F811
    limit_bytes = 200_000  # two thirds of the dataset
    command = [sys.executable, "-c", PROCESS, remote, str(tmp_path), str(limit_bytes / 1e9)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    expected = digest(local)
    assert [json.loads(process.communicate()[0]) for process in running] == [expected, expected]
    assert 0.9 * limit_bytes < held(tmp_path) <= int((tmp_path / COUNT).read_bytes()) <= limit_bytes
    assert not [path for path in files(tmp_path) if path.suffix == ".tmp"]
