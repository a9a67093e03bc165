"""Configuration: values, typos, help, exit statuses; every YAML of the repository fits its schema."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from configs import load


@dataclass(frozen=True)
class Tower:
    weights: str | None = None
    """Where the weights are."""
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class Job:
    source: str = "???"
    """What to read."""
    clips: int = 7
    devices: list[int] = field(default_factory=list)
    tower: Tower = field(default_factory=Tower)


def test_later_arguments_win_and_nest(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("clips: 3\ntower: {weights: here}\n")
    config = load.load(Job, ["clips=5", f"config={tmp_path}/a.yaml", "source=x", "devices=[0,1]", "tower.precision=bf16"])
    assert config == Job(source="x", clips=5, devices=[0, 1], tower=Tower(weights="here", precision="bf16"))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("clisp=3", ["clisp", "clips"]),
        ("tower.wieghts=a", ["tower.wieghts", "weights"]),
        ("clips=many", ["clips", "many"]),
        ("tower.precision=fp8", ["fp8", "bf16"]),
    ],
)
def test_a_wrong_argument_is_named_with_the_right_one(argument: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load.load(Job, ["source=x", argument])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("text", ["0123", "1e5", "-abc", "a: b", "[x", "yes", "3"])
def test_text_stays_text(text: str) -> None:
    assert load.load(Job, [f"source={text}"]).source == text
    assert load.load(Job, [text], positional="source").source == text


def test_saved_configuration_repeats_the_job(tmp_path: Path) -> None:
    config = Job(source="a=b", devices=[3], tower=Tower("w"))
    load.save(config, tmp_path / "config.yaml")
    assert load.load(Job, [f"config={tmp_path}/config.yaml"]) == config


def test_exit_statuses_and_messages(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Job) -> None:
        """Does things."""
        if config.clips == 1:
            raise load.JobError("one clip is lonely")
        if config.clips == 2:
            raise ValueError("two clips; expected three")
        if config.clips == 3:
            raise KeyboardInterrupt

    def status(*arguments: str) -> int:
        return load.job_main(Job, run, arguments, command="job")

    assert [status("source=x", f"clips={n}") for n in range(4)] == [0, 1, 2, 130]
    errors = capsys.readouterr().err
    assert "one clip is lonely" in errors and "expected three" in errors and "run the same command again" in errors and "Traceback" not in errors
    assert status() == 2
    assert "missing source=..." in capsys.readouterr().err
    assert status("--help") == 0
    printed = capsys.readouterr().out
    assert "source: str" in printed and "What to read." in printed and "tower.weights: str | None = null" in printed and "Does things." in printed
