"""Shared fixtures. `SHARED` is the folder of reference material beside the checkout; tests that need it skip where it is absent."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from tests.s3 import S3, Faults, Proxy, proxied, server

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference material, or a skip."""
    if not (SHARED / "reference").is_dir():
        pytest.skip(f"no reference material at {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole test run; jobs that ask for a cluster find it already there."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """One object storage server for the whole test run, started when the first test asks for it."""
    with server() as running:
        yield running


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """Object storage for one test: `s3.url` is a prefix of its own, and this process's environment says where the server is."""
    mine = replace(s3_server, url=f"{s3_server.url}/{secrets.token_hex(6)}")
    for name, value in mine.environment.items():
        monkeypatch.setenv(name, value)
    return mine


@pytest.fixture
def flaky_s3(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Faults], Proxy]]:
    """`flaky_s3(Faults(...))` puts a misbehaving proxy before the test's object storage, and points this process's environment at it."""
    with ExitStack() as stack:

        def start(faults: Faults) -> Proxy:
            proxy = stack.enter_context(proxied(s3, faults))
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.s3.endpoint)
            return proxy

        yield start
