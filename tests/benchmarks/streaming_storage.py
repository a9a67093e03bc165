"""One epoch from an object store, by each reader that can read from one: a SeaweedFS server on this machine, and the same behind a link that adds a
latency to each request and limits each connection's bandwidth.

Knows the server and how each library is told where it is. The server and the link run on the same processors as the reader: ratios within a round say
more than rates. Their CPU time is not counted.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import obstore
from obstore.store import S3Store

from configs import storage
from tests.benchmarks.streaming_readers import READERS, Measured, Task, in_a_process
from tests.benchmarks.streaming_sets import Shape, written
from tests.link import linked
from tests.s3 import BUCKET, S3, server

LATENCY_SECONDS, BYTES_PER_SECOND = 0.05, 60e6
REMOTE = (
    "soundshard",
    "bare ranges",
    "webdataset",
    "webdataset (best)",
    "MosaicML streaming",
    "MosaicML streaming (best)",
    "litdata",
    "litdata (best)",
)
"""Readers that can; the others are for local files."""


def from_storage(root: Path, names: Sequence[str], template: Task, rounds: int) -> dict[str, dict[str, list[Measured]]]:
    """What each reader took in each round: directly, and behind the link."""
    found: dict[str, dict[str, list[Measured]]] = {}
    with server() as s3:
        os.environ |= s3.environment
        for form in dict.fromkeys(READERS[name].form for name in names):
            upload(written(root, form, Shape(template.hop_frames), template.samples), f"{s3.url}/{form}")
        with linked(urlsplit(s3.endpoint).netloc, latency_seconds=LATENCY_SECONDS, bytes_per_second=BYTES_PER_SECOND) as link:
            ways = {"direct": s3, "link": replace(s3, endpoint=f"http://{link.address}")}
            for number in range(rounds):
                for way, through in ways.items():
                    for name in names:
                        task = replace(template, reader=name, place=place(through, name), seconds=0.0, round=number)
                        measured = one_epoch(task, through)
                        found.setdefault(way, {}).setdefault(name, []).append(measured)
                        print(f"round {number}: {way}: {name}: {measured}", file=sys.stderr, flush=True)
    return found


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        with storage.writing(f"{url}/{path.name}") as target, open(path, "rb") as source:
            while data := source.read(1 << 22):
                target.write(data)


def place(s3: S3, name: str) -> str:
    """Where a reader finds its set. webdataset is given signed addresses for curl, one for each tar."""
    form = READERS[name].form
    if not name.startswith("webdataset"):
        return f"{s3.url}/{form}"
    store = S3Store(BUCKET, endpoint=s3.endpoint, client_options={"allow_http": True})
    tars = sorted(file.path.partition(f"/{BUCKET}/")[2] for file in storage.scan(f"{s3.url}/{form}") if file.path.endswith(".tar"))
    return json.dumps([f"pipe:curl --silent --fail '{obstore.sign(store, 'GET', tar, timedelta(hours=6))}'" for tar in tars])


def one_epoch(task: Task, s3: S3) -> Measured:
    """In a process of its own, whose caches begin empty and go with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {**s3.environment, "AWS_DEFAULT_REGION": s3.environment["AWS_REGION"], "TMPDIR": folder, "XDG_CACHE_HOME": folder}
        return in_a_process(task, environment)
