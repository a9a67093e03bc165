"""Blocks from object storage: the same batches as from a disk, also where storage is far away, unwell or gone, and what is fetched for them."""

import json
import re
import threading
import time
from collections import Counter
from concurrent.futures import wait
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from urllib.parse import urlsplit

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from configs import storage
from shards import source
from shards.blocks import BlockReader, FetchConfig, Ranges
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from shards.windows import Windows
from tests.link import linked
from tests.s3 import KEYS, LISTING_KEYS, Faults
from tests.shards.test_stream import clip, dataset

SMALL = {"batch_size": 12, "lanes": 3, "segments": 2, "seed": 5, "block_bytes": 12_000, "open_blocks": 2}
"""A clip has 4 to 6 KB in its tar: a block has one or two."""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """61 clips of 5 to 11 segments in shards of unequal size."""
    numbers = iter(range(61))
    shards = [[clip(number, 5 + number % 7) for _, number in zip(range(size), numbers, strict=False)] for size in (3, 29, 1, 28)]
    return str(dataset(tmp_path_factory.mktemp("blocks") / "set", shards))


@pytest.fixture
def remote(local, s3):
    """The same, in object storage."""
    for name in storage.names(local):
        storage.write_bytes(f"{s3.url}/{name}", storage.read_bytes(f"{local}/{name}"))
    return s3.url


@pytest.fixture
def link(s3, monkeypatch):
    """A link to object storage that this process's environment points at: 50 ms for each request, 60 MB/s for each connection."""
    with linked(urlsplit(s3.endpoint).netloc) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{running.address}")
        yield running


def stream(root, rank=0, world=1, *, shuffle=True, **values):
    return FeatureStream(Index.open(root), StreamConfig(**SMALL | values), rank, world, shuffle=shuffle)


def take(made, steps):
    with closing(iter(made)) as batches:
        return [next(batches) for _ in range(steps)]


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch["keys"] == other["keys"]
        assert torch.equal(batch["features"], other["features"]) and torch.equal(batch["codes"], other["codes"])


def fetchers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("soundshard-fetch")]


def reads(proxy):
    """Requests for tars, by name."""
    return Counter(path.rpartition("/")[2] for method, path in proxy.requests if method == "GET" and path.partition("?")[0].endswith(".tar"))


# --- the same batches ------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("link")
@pytest.mark.parametrize("values", [{}, {"read_ahead_mb": 1, "connections": 3}, {"block_bytes": 8 << 20}, {"prefetch": 0, "windows_per_clip": 3}])
def test_a_far_dataset_gives_the_batches_of_a_near_one(local, remote, values):
    batches = take(stream(remote, **values), 17)
    assert_equal(batches, take(stream(local, **values), 17))
    keys = [key for batch in batches for key in batch["keys"]]
    if "windows_per_clip" not in values:
        assert sorted(keys[:61]) == sorted(keys[61:122]) == sorted(f"clip_{number}" for number in range(61))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_a_far_dataset(local, remote, world):
    for rank in range(world):
        far, near = (stream(root, rank, world, lanes=world) for root in (remote, local))
        assert_equal(take(far, 4), take(near, 4))
        assert_equal(take(far, 4), take(near, 4))  # goes on where it was left


@pytest.mark.usefixtures("link")
def test_evaluation_reads_far_datasets(local, remote):
    far, near = (list(stream(root, shuffle=False, batch_size=7)) for root in (remote, local))
    assert_equal(far, near)
    assert len(far) == 9 and not [key for key, count in Counter(key for batch in far for key in batch["keys"]).items() if count > 1]


def test_storage_that_misbehaves_changes_no_batch(local, remote, flaky_s3):
    proxy = flaky_s3(Faults(error=0.2, cut_response=0.15, lost_response=0.1, methods=("GET",)))
    assert_equal(take(stream(remote), 12), take(stream(local), 12))
    assert all(proxy.happened[fault] > 3 for fault in ("error", "cut_response", "lost_response")), proxy.happened


@pytest.mark.parametrize("state", ["down", "silent"])
def test_an_outage_is_waited_for(local, remote, link, state):
    with closing(iter(stream(remote, read_ahead_mb=1, prefetch=0))) as batches:
        got = [next(batches) for _ in range(3)]
        link.set(state)
        threading.Timer(4.0, link.set, ("up",)).start()
        got += [next(batches) for _ in range(9)]
    assert_equal(got, take(stream(local), 12))


def test_several_far_datasets_and_subsets(local, remote, tmp_path, s3):
    """Every third clip of one, mixed with all of another."""
    other = str(dataset(tmp_path / "other", [[clip(number, 8) for number in range(100, 117)]]))
    for name in storage.names(other):
        storage.write_bytes(f"{s3.url}/other/{name}", storage.read_bytes(f"{other}/{name}"))
    batches = []
    for first, second in ((local, other), (remote, f"{s3.url}/other")):
        index = Index.open(first)
        sparse = Index(index.root, index.info, index.table.filter(pc.is_in(index.table["key"], index.keys.take(list(range(0, 61, 3))))))
        batches.append(take(FeatureStream([sparse, Index.open(second)], StreamConfig(**SMALL | {"weights": [2.0, 1.0]})), 15))
    assert_equal(*batches)
    assert len({key for batch in batches[0] for key in batch["keys"]}) == 21 + 17


# --- what is fetched -------------------------------------------------------------------------------------------------------------------


def test_each_block_is_fetched_once_an_epoch(remote, flaky_s3):
    proxy = flaky_s3(Faults())
    made = stream(remote, lanes=1, batch_size=1, prefetch=0, shuffle=False)
    ranges = len(np.unique(made._sources[0]._range_of))
    assert len(list(made)) == 61
    assert 15 < ranges < 50 and reads(proxy).total() == ranges + 1  # and one for what the first batch needs, before whole blocks are asked for
    made = stream(remote, lanes=1, batch_size=1, prefetch=0, read_ahead_mb=1000)
    proxy.requests.clear()
    take(made, 61)  # shuffled: and what the next epoch begins with, which is known by then
    assert ranges + 1 <= reads(proxy).total() < 1.5 * ranges


def test_neighbours_are_fetched_together_unless_the_gap_is_wide(remote, monkeypatch):
    index = Index.open(remote)
    sparse = Index(index.root, index.info, index.table.filter(pc.is_in(index.table["key"], index.keys.take([3, 4, 6, 20, 31]))))
    ends = []
    for gap in (100_000, 20_000, 0):
        monkeypatch.setattr(source, "WIDEST_GAP_BYTES", gap)
        made = Windows(sparse, 2)
        made.blocks(8 << 20)
        ends.append(made._range_of.tolist())
    assert ends == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def reader(s3, sizes, **values):
    """Ranges of these sizes, one after another in one object, and a reader of them."""
    stops = np.cumsum(sizes)
    data = np.random.default_rng(0).bytes(int(stops[-1]))
    storage.write_bytes(f"{s3.url}/x.tar", data)
    return BlockReader(Ranges([f"{s3.url}/x.tar"], np.zeros(len(sizes), np.int64), stops - sizes, stops), FetchConfig(**values)), data


def use(made, number, start, stop):
    with made.using(np.array([number]), np.array([start]), np.array([stop])) as (found, begins):
        return bytes(found[0][start - begins[0] : stop - begins[0]])


def test_reading_ahead_is_bounded_and_in_order(flaky_s3):
    proxy = flaky_s3(Faults())
    made, data = reader(proxy.s3, np.full(11, 400_000), read_ahead_mb=1)
    order = np.array([7, 7, 3, 1, 3, 9, 10, 0])
    made.tell(order[:5])
    made.tell(order[5:])
    wait(made._held.values())
    assert list(made._held) == [7, 3]  # and no third: it would be more than a megabyte
    got = []
    for number in order.tolist():
        start = 400_000 * number + 5
        got.append(use(made, number, start, start + 99) == data[start : start + 99])
        wait(made._held.values())
        assert sum(400_000 for held in made._held if held in made._unused) <= 1 << 20
    assert all(got) and not made._held
    assert reads(proxy) == {"x.tar": 6}  # seven and three once, though used twice
    made.close()


def test_what_was_not_told_is_fetched_alone(flaky_s3):
    proxy = flaky_s3(Faults())
    made, data = reader(proxy.s3, np.full(3, 400_000))
    assert use(made, 1, 500_000, 500_010) == data[500_000:500_010] and not made._held
    made.tell(np.array([1]))
    assert use(made, 1, 500_000, 500_010) == data[500_000:500_010] and not made._held
    assert reads(proxy) == {"x.tar": 2}
    made.close()


# --- what goes wrong -------------------------------------------------------------------------------------------------------------------


def test_storage_that_stays_away_is_an_error_that_names_the_object(remote, link, monkeypatch):
    made = stream(remote, read_ahead_mb=1)
    batches = iter(made)
    next(batches)
    monkeypatch.setattr(storage, "RETRY_SECONDS", 2.0)
    link.set("down")
    with pytest.raises(storage.StorageError, match=rf"{re.escape(remote)}/train-00000\d\.tar: check that the store can be reached"):
        list(islice(batches, 61))
    link.set("up")
    batches.close()
    assert take(made, 1) and made.consumed < 61 * 12


def test_leaving_does_not_wait_for_storage_that_is_away(remote, link):
    batches = iter(stream(remote, read_ahead_mb=1))
    next(batches)
    link.set("down")
    batches.close()
    for thread in fetchers():
        thread.join(30.0)
    assert not fetchers()  # RETRY_SECONDS are 180


def test_an_object_that_is_replaced_meanwhile_is_an_error(local, remote):
    with closing(iter(stream(remote, read_ahead_mb=1, connections=1, prefetch=0, lanes=1, batch_size=1))) as batches:
        next(batches)
        for name in [name for name in storage.names(local) if name.endswith(".tar")]:
            data = bytearray(storage.read_bytes(f"{local}/{name}"))
            data[-1] ^= 1
            storage.write_bytes(f"{remote}/{name}", data)
        with pytest.raises(storage.StorageError, match=r"train-00000\d\.tar: it was replaced while it was read"):
            list(islice(batches, 61))


def test_objects_that_are_not_there_or_cut_short(local, remote):
    storage.write_bytes(f"{remote}/train-000001.tar", storage.read_bytes(f"{local}/train-000001.tar")[:9000])
    with pytest.raises(ValueError, match=r"train-000001\.tar has 9000 bytes, and its ledger leads to byte \d+: the file is cut short"):
        take(stream(remote), 61)
    index = Index.open(remote)
    storage.remove(f"{remote}/train-000001.tar")
    with pytest.raises(ValueError, match=r"train-000001\.tar is missing, though its ledger is there"):
        take(FeatureStream(index, StreamConfig(**SMALL)), 61)


def test_values_that_cannot_be_meant(local):
    for values in ({"connections": 0}, {"read_ahead_mb": 0}, {"cache_gb": 0.0}):
        with pytest.raises(ValueError, match="must be at least 1, and cache_gb above 0"):
            stream(local, **values)


# --- credentials -----------------------------------------------------------------------------------------------------------------------


def test_credentials_exchanged_in_the_environment_are_used(local, remote, flaky_s3, monkeypatch):
    proxy = flaky_s3(Faults())
    with closing(iter(stream(remote, prefetch=0))) as batches:
        got = [next(batches) for _ in range(2)]
        for name, value in LISTING_KEYS.items():
            monkeypatch.setenv(name, value)
        got += [next(batches) for _ in range(8)]
    assert_equal(got, take(stream(local), 10))
    assert set(proxy.signers) == {KEYS["AWS_ACCESS_KEY_ID"], LISTING_KEYS["AWS_ACCESS_KEY_ID"]}


@pytest.fixture
def metadata_server():
    """What a cloud's machines ask for their role's credentials, by IMDSv2. `keys` is what it hands out, `asked` how often it was asked."""

    class Handler(BaseHTTPRequestHandler):
        keys, asked = KEYS, 0

        def do_PUT(self) -> None:
            self._answer("a token")

        def do_GET(self) -> None:
            if self.path.endswith("/security-credentials/"):
                self._answer("role")
                return
            Handler.asked += 1
            keys, until = Handler.keys, datetime.now(UTC) + timedelta(seconds=10)  # renewed from five minutes before that on
            named = {"AccessKeyId": keys["AWS_ACCESS_KEY_ID"], "SecretAccessKey": keys["AWS_SECRET_ACCESS_KEY"], "Token": ""}
            self._answer(json.dumps({**named, "Expiration": until.isoformat().replace("+00:00", "Z")}))

        def _answer(self, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a test's output is its own."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}", Handler
        listening.shutdown()


def test_a_roles_credentials_are_renewed_before_they_expire(local, remote, flaky_s3, metadata_server, monkeypatch):
    proxy, (address, served) = flaky_s3(Faults()), metadata_server
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", address)
    with closing(iter(stream(remote, prefetch=0, read_ahead_mb=1, connections=1))) as batches:
        got = [next(batches) for _ in range(2)]
        asked, served.keys = served.asked, LISTING_KEYS
        time.sleep(0.2)  # it is not asked more often than every tenth of a second
        got += [next(batches) for _ in range(6)]
    assert_equal(got, take(stream(local), 8))
    assert 0 < asked < served.asked
    assert set(proxy.signers) == {KEYS["AWS_ACCESS_KEY_ID"], LISTING_KEYS["AWS_ACCESS_KEY_ID"]}
