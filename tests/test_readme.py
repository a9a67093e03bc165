"""What the README says of the repository is so: its map, its jobs, its commands; and every YAML fits the schema it is for."""

import importlib
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from configs import cli, load
from pipeline import demo, estimate, generate
from train import vaura
from train.sync_contrast import ContrastJob
from train.sync_pairs import PairJob, SynchronisableJob

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_map_names_every_module() -> None:
    linked = {Path(link).name for link in re.findall(r"\]\(([\w/.]+)\)", README)}
    modules = {p.name for folder in ("configs", "shards", "model", "pipeline", "train") for p in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert modules <= linked, f"the README's map lacks {sorted(modules - linked)}"
    assert all((ROOT / link).exists() for link in re.findall(r"\]\((?!http)([\w/.]+/[\w.]+)\)", README))


def test_every_job_is_there_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for job, (module, _) in cli.JOBS.items():
        assert re.search(rf"`{job}[ `]", README), f"the README does not mention the job {job}"
        assert importlib.import_module(module).main(["--help"]) == 0
        described = capsys.readouterr().out
        assert f"usage: soundshard {job}" in described
        undocumented = re.findall(r"^  (\S+): .*\n(?!      )", described + "\n", re.MULTILINE)
        assert not undocumented, f"{job}: options without a docstring: {undocumented}"


def test_options_in_the_readme_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"^soundshard ([\w.-]+) (.*)$", README, re.MULTILINE)
    assert len(commands) >= 15 and {"train.sync", "sync", "evaluate.sync"} <= {job for job, _ in commands}
    for job, arguments in commands:
        module, asked = importlib.import_module(cli.JOBS[job][0]), []

        def ask(schema: type, _run: object, argv: list[str], *, command: str, positional: str | None = None, asked: list = asked) -> int:
            asked.append((schema, argv, command, positional))
            return 0

        monkeypatch.setattr(module, "job_main", ask)
        assert module.main(shlex.split(arguments, comments=True)) == 0
        ((schema, given, command, positional),) = asked
        assert command == job
        load.load(schema, given, positional=positional)


def test_every_yaml_fits_its_schema() -> None:
    schemas = {"demo", "train_vaura", "generate_published", "train_avclip", "train_sync", "train_synchability"}
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == schemas
    assert {path.name for path in (ROOT / "configs" / "cluster").glob("*.yaml")} == {"example_cluster.yaml", "rayjob.yaml"}
    load.load(estimate.Cluster, ["config=cluster/example_cluster"])  # the RayJob is Kubernetes' matter: tests/configs/test_cluster_recipes.py
    load.load(demo.DemoConfig, ["config=demo"])
    load.load(generate.GenerateConfig, ["config=generate_published", "run=x", "out=y"])
    load.load(vaura.TrainConfig, ["config=train_vaura", "data=x", "out=y"])
    for name, schema in (("avclip", ContrastJob), ("sync", PairJob), ("synchability", SynchronisableJob)):
        load.load(schema, [f"config=train_{name}", "data=x", "out=y"])
    sections = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    for job in {f.name for f in fields(demo.DemoConfig)} & set(cli.JOBS):
        module = importlib.import_module(cli.JOBS[job][0])
        schema = next(value for name, value in vars(module).items() if name.lower() == f"{job}config")
        OmegaConf.merge(OmegaConf.structured(schema), sections.get(job, {}))


def test_nothing_large_is_in_the_repository() -> None:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    large = [name for name in names if name and (ROOT / name).stat().st_size > 2_000_000]
    assert not large
