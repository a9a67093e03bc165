"""How the tests are run, and shared fixtures. `SHARED` is the folder of reference material beside the checkout; tests that need it may skip."""

import logging
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from tests.s3 import S3, Faults, Proxy, proxied, server

SHARED = Path(__file__).resolve().parents[2] / "shared"
WORKER_GIB = 7
"""Memory that a process of the tests may need with all that it starts: networks of full size, a Ray, a storage server, a browser."""
MOST_WORKERS = 4
"""The longest files begin first and last two minutes: more would wait for them."""


def pytest_configure() -> None:
    """Interrupts end what a test starts, from wherever the tests are started: a shell's `&` has them ignored, by children too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`-n auto`: as many processes as there are processors and memory for; none of their own for single files."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    if all(Path(argument.partition("::")[0]).is_file() for argument in config.args):
        return 0
    processors = len(os.sched_getaffinity(0))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    workers = min(processors, memory_bytes // (WORKER_GIB << 30), MOST_WORKERS)
    if workers < 2:
        return 0
    # Each computing with as many threads as there are processors, they would mostly wait for each other: a convolution took six times as long.
    os.environ.setdefault("OMP_NUM_THREADS", str(processors // workers))
    return workers


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
        logging_level=logging.ERROR,
        # Workers stay for the next job, which Ray otherwise starts anew for each: a second of a processor a piece.
        _system_config={"idle_worker_killing_time_threshold_ms": 600_000, "num_workers_soft_limit": 6},
    )
    yield
    from pipeline.ray_loop import end_ray  # not before the hook that has the product's modules checked as they are imported

    end_ray()


@pytest.fixture
def ray_address(ray_cluster: None) -> str:  # noqa: ARG001
    """That of the same Ray, for jobs in processes of their own that need none of their own."""
    return ray.get_runtime_context().gcs_address


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
