"""The job as a user starts it: several processes that train as one, and signals that end it in order."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.data import SMALL, small_config, write_features
from train.callbacks import read_metrics
from train.vaura import run

ROOT = Path(__file__).resolve().parents[2]
NO_DRAWS = ["model.dropout=0", "model.guidance_dropout=0", "stream.lanes=2"]


def start(data: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "train.vaura", *SMALL.split(), f"data={data}", f"out={out}", *options]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_rows(job: subprocess.Popen, folder: Path, rows: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(folder)) < rows:
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    # 7 validation clips: one process has a batch more than the other, and nothing may wait for it.
    data = write_features(tmp_path / "data", clips=23, validation=7)
    options = [*NO_DRAWS, "trainer.val_check_interval=4", "trainer.keep_every=2"]
    job = start(data, tmp_path / "two", *options, "trainer.devices=2")
    errors = job.communicate(timeout=300)[1]
    assert job.returncode == 0, errors
    run(small_config(data, tmp_path / "one", *options))
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [(r["step"], r["split"]) for r in one] == [(r["step"], r["split"]) for r in two]
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], abs=2e-4)
    assert [r["samples"] for r in two if r["split"] == "validation"] == [7, 7]
    left, right = (torch.load(tmp_path / name / "checkpoints/step-000000002.ckpt", weights_only=True) for name in ("one", "two"))
    means, others = ([state["exp_avg"] for state in states["optimizer_states"][0]["state"].values()] for states in (left, right))
    torch.testing.assert_close(means, others, rtol=1e-4, atol=1e-7)
    positions = [state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["consumed"] for state in (left, right)]
    assert positions == [12, 12]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "devices"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_signal_leaves_a_checkpoint_to_resume_from(tmp_path: Path, number: int, devices: int) -> None:
    data = write_features(tmp_path / "data", clips=11)
    endless = ["trainer.max_steps=100000", "trainer.log_every=1", "schedule.total_steps=100", f"trainer.devices={devices}", "stream.lanes=2"]
    job = start(data, tmp_path / "run", *endless)
    wait_for_rows(job, tmp_path / "run", 5)
    if number == signal.SIGINT:
        os.killpg(job.pid, number)  # as a terminal does
    else:
        job.send_signal(number)  # as a scheduler may: to the first process alone
    errors = job.communicate(timeout=120)[1]
    assert job.returncode == 130, errors
    assert "run the same command again to go on" in errors and "Traceback" not in errors
    step = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    rows = [row["step"] for row in read_metrics(tmp_path / "run")]
    assert rows == [*range(1, step + 1)]
    options = [*endless, "trainer.devices=1"]
    run(small_config(data, tmp_path / "run", *options, f"trainer.max_steps={step + 2}"))
    run(small_config(data, tmp_path / "straight", *options, f"trainer.max_steps={step + 2}"))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [*range(1, step + 3)]
    if devices == 1:
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "straight"))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_killed_training_has_the_curve_of_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL in mid-epoch, and then one process goes on, or two: each step's loss is that of an uninterrupted run."""
    data = write_features(tmp_path / "data", clips=97)
    options = [*NO_DRAWS, "trainer.log_every=1", "trainer.checkpoint_every=4", "schedule.total_steps=1000"]
    job = start(data, tmp_path / "one", *options, "trainer.max_steps=100000")
    wait_for_rows(job, tmp_path / "one", 6)
    os.killpg(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    reached = read_metrics(tmp_path / "one")[-1]["step"]
    last = torch.load(tmp_path / "one/checkpoints/last.ckpt", weights_only=True)
    position = last["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["consumed"]
    assert position == 6 * last["global_step"] and position % 97
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    options.append(f"trainer.max_steps={reached + 9}")
    two = start(data, tmp_path / "two", *options, "trainer.devices=2")
    run(small_config(data, tmp_path / "one", *options))
    run(small_config(data, tmp_path / "straight", *options))
    errors = two.communicate(timeout=300)[1]
    assert two.returncode == 0, errors
    curves = {name: [(row["step"], row["loss"]) for row in read_metrics(tmp_path / name)] for name in ("straight", "one", "two")}
    assert curves["one"] == curves["straight"] and [step for step, _ in curves["straight"]] == [*range(1, reached + 10)]
    assert [step for step, _ in curves["two"]] == [*range(1, reached + 10)]
    assert [loss for _, loss in curves["two"]] == pytest.approx([loss for _, loss in curves["straight"]], abs=2e-4)


@pytest.mark.slow
def test_compiled_blocks_train_the_same(tmp_path: Path) -> None:
    # In a process of its own: run-time shape checks, on under pytest, are not the compiler's business.
    data = write_features(tmp_path / "data", clips=11)
    options = [*NO_DRAWS, "trainer.max_steps=4", "trainer.log_every=1"]
    job = start(data, tmp_path / "compiled", *options, "trainer.compile=true", "trainer.checkpoint_activations=true")
    errors = job.communicate(timeout=300)[1]
    assert job.returncode == 0, errors
    run(small_config(data, tmp_path / "plain", *options))
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("compiled", "plain")]
    assert len(losses[1]) == 4 and losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert load_file(tmp_path / "compiled/model.safetensors").keys() == load_file(tmp_path / "plain/model.safetensors").keys()
