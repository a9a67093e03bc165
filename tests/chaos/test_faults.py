"""What happens to a preparation when the machines, the disk or the storage fail: nothing is lost, nothing is done twice, and the last line helps.

A job that something happens to while it works is a process of its own, with a Ray of its own that ends with it; the others run here.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from configs import cli
from tests.chaos.harness import Driver, Nodes, check, decoders, make_inputs, marking, mounted, rows, sha256s, wait_for
from tests.chaos.run import run
from tests.s3 import S3, Faults, proxied

FAST = ("encode.short_side=64", "encode.preset=ultrafast", "clips_per_shard=7")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """30 clips, 3 of them broken files."""
    folder = tmp_path_factory.mktemp("faults") / "in"
    return folder, make_inputs(folder, 30, bad=3, kinds=("truncated", "text", "empty"))


@pytest.fixture(scope="module")
def undisturbed(inputs: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> dict[str, str]:  # noqa: ARG001
    """The shards of a run that nothing happens to."""
    out = str(tmp_path_factory.mktemp("undisturbed"))
    assert cli.main(["reencode", f"source={inputs[0]}", f"out={out}", *FAST]) == 0
    assert check(out, *inputs) == []
    return sha256s(out)


@pytest.mark.slow
def test_workers_nodes_and_decoders_die_and_object_storage_ends_up_whole(tmp_path: Path) -> None:
    figures = run(clips=60, bad=7, seed=1, nodes=3, remote=True, kill_seconds=2.0, kills=10, node_kills=1, job="prepare", folder=tmp_path)
    assert figures["wrong"] == []
    assert sum(figures["killed"].values()) >= 2, "nothing was killed, so nothing was shown"


@pytest.mark.slow
def test_a_frozen_node_holds_nothing_up_for_long(inputs: tuple[Path, dict[str, str]], undisturbed: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path)
    with Nodes(count=2) as nodes:
        address = nodes.cluster.address
        driver = Driver("reencode", f"source={inputs[0]}", f"out={out}", *FAST, f"ray.address={address}", "freeze_seconds=6")
        wait_for(lambda: len(nodes.workers("ray::encode")) >= 1 or driver.process.poll() is not None)
        assert driver.process.poll() is None, driver.wait()
        frozen = nodes.freeze(0)
        assert driver.wait(120) == 0, driver.text
        for process in frozen:
            if os.path.exists(f"/proc/{process}"):
                os.kill(process, signal.SIGCONT)
        time.sleep(2)  # what was frozen may go on now, and must change nothing
    assert check(out, *inputs) == []
    assert sha256s(out) == undisturbed


def test_a_killed_driver_is_taken_up_again(
    inputs: tuple[Path, dict[str, str]], undisturbed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("reencode", f"source={inputs[0]}", f"out={tmp_path}", *FAST, "ray.num_cpus=2", "in_flight=1")
    with marking() as mark:
        first = Driver(*command)
    wait_for(lambda: (tmp_path / "train-000000.parquet").exists())
    first.kill()
    committed = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("train-*.parquet")}
    wait_for(lambda: not decoders(mark), 15)
    assert cli.main([*command]) == 0
    assert f"reencode: {len(committed)} shards done, {5 - len(committed)} to do" in capsys.readouterr().out
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in committed} == committed
    assert check(str(tmp_path), *inputs) == [] and sha256s(str(tmp_path)) == undisturbed


def test_a_full_and_a_read_only_disk_stop_the_job_and_it_goes_on_when_mended(
    inputs: tuple[Path, dict[str, str]], undisturbed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, 1) as possible:
        if not possible:
            pytest.skip("this user may not mount a small file system")
        command = ["reencode", f"source={inputs[0]}", f"out={disk}/data", *FAST]
        filler = disk / "filler"
        filler.write_bytes(bytes((1 << 20) - (150 << 10)))
        full = Driver(*command, "ray.num_cpus=2")
        assert full.wait(120) == 1
        assert "No space left on device" in full.text and "run the same command again" in full.text
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=100m,ro", str(disk)], check=True)
        assert cli.main(command) == 1
        assert "Read-only file system" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert cli.main(command) == 0
        assert check(f"{disk}/data", *inputs) == [] and sha256s(f"{disk}/data") == undisturbed


def test_storage_that_fails_for_a_while_delays_and_breaks_nothing(s3: S3, inputs: tuple[Path, dict[str, str]], undisturbed: dict[str, str]) -> None:
    out, before = f"{s3.url}/media", s3.unfinished_uploads()
    with proxied(s3, Faults(error=0.2, cut_request=0.1, cut_response=0.1, seconds=8.0)) as proxy:
        driver = Driver("reencode", f"source={inputs[0]}", f"out={out}", *FAST, "ray.num_cpus=2", environment=proxy.s3.environment)
        assert driver.wait(240) == 0, driver.text
    assert check(out, *inputs) == [] and sha256s(out) == undisturbed
    assert len(rows(out)) == 30
    assert s3.unfinished_uploads() == before
