import json
import shlex
from pathlib import Path

import pytest
import yaml

from configs.load import JobError
from pipeline.steps import Step, as_argument, flatten, make_step, run_steps

SMALL = {"clips": 2, "validation": 0, "test": 1, "seconds": 2.0, "width": 64, "height": 48, "workers": 1}


def test_options_become_what_a_user_would_type(tmp_path: Path) -> None:
    options = {
        "out": tmp_path / "my clips",
        "trainer": {"max_steps": 3, "deep": {"on": True}},
        "rates": [30, 24],
        "none": None,
        "text": "a b",
        "x": 1e-4,
    }
    step = make_step("train", options, product=tmp_path)
    assert step.arguments[1:] == ("trainer.max_steps=3", "trainer.deep.on=true", "rates=[30, 24]", "none=null", "text=a b", "x=0.0001")
    assert shlex.split(step.command) == ["soundshard", "train", *step.arguments]
    assert flatten({}) == {}


@pytest.mark.parametrize("value", [1, 0.25, 1e-9, True, None, [1, 2], ["a", "b"], {"k": 1}])
def test_arguments_read_back_as_the_value(value: object) -> None:
    assert yaml.safe_load(as_argument(value)) == value


def test_a_step_runs_once_and_again_after_a_change_before_it(tmp_path: Path) -> None:
    def steps(seed: int) -> list[Step]:
        first, second = tmp_path / f"first{seed}", tmp_path / "second"
        return [make_step("synth", {"out": first, **SMALL, "seed": seed}, product=first / "contacts.json"),
                make_step("weights", {}, product=second)]  # fmt: skip

    (tmp_path / "second").mkdir()
    ran = run_steps(steps(0), tmp_path / "steps")
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "steps").iterdir()}
    assert set(stamps) == {"synth.json", "weights.json"} and len(list((tmp_path / "first0").glob("*.mp4"))) == 2
    again = run_steps(steps(0), tmp_path / "steps")
    assert [r.seconds for r in again] == [r.seconds for r in ran]
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "steps").iterdir()} == stamps
    run_steps(steps(1), tmp_path / "steps")
    assert all(p.stat().st_mtime_ns > stamps[p.name] for p in (tmp_path / "steps").iterdir())
    (tmp_path / "first1" / "contacts.json").unlink()  # a product that is gone is made again
    run_steps(steps(1), tmp_path / "steps")
    assert (tmp_path / "first1" / "contacts.json").is_file()


def test_a_failed_step_ends_the_row_and_is_tried_again(tmp_path: Path) -> None:
    bad = make_step("synth", {"out": tmp_path / "x", **SMALL, "seconds": 1.0}, product=tmp_path / "x")
    for _ in range(2):
        with pytest.raises(JobError, match="ended with status 2"):
            run_steps([bad, bad], tmp_path / "steps")
    assert json.loads((tmp_path / "steps" / "synth.json").read_text())["done"] is False
