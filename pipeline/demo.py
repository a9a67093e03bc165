"""`soundshard demo`: the whole path on small clips, by the commands that a user would type, and a page of what came out.

Every stage is a command line of its own, with the values of `configs/demo.yaml`: the demo knows the jobs' options and nothing of
their insides. What came of them is read and measured by `pipeline.demo_results`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from configs import storage
from configs.load import job_main
from model.weights import resolve
from pipeline.demo_results import HOW_TO_PUBLISHED, hear, page_data, results_line
from pipeline.discover import DiscoverConfig, discover
from pipeline.page import write_page
from pipeline.steps import Step, make_step, run_steps

PUBLISHED = {"tower": "avclip", "codec": "encodec24"}


@dataclass(frozen=True)
class DemoConfig:
    """Options of `soundshard demo`. The other jobs' come from configs/demo.yaml; `train.trainer.max_steps=300` and the like change them."""

    out: str = "demo"
    """Folder for everything; `page.html` in it is what to look at."""
    source: str = ""
    """A folder of your own clips; without one, clips are made by program."""
    weights: Literal["standin", "published"] = "standin"
    """Networks for features and tokens: `standin` fits small ones on the clips; `published` takes Segment-AVCLIP and EnCodec from the cache
    (slow without a GPU)."""
    page_clips: int = 8
    """Held-out clips on the page; all that are generated count in the measure."""
    synth: dict[str, Any] = field(default_factory=dict)
    """Options of `soundshard synth`."""
    reencode: dict[str, Any] = field(default_factory=dict)
    """Options of `soundshard reencode`."""
    standin: dict[str, Any] = field(default_factory=dict)
    """Options of `soundshard standin`."""
    featurise: dict[str, Any] = field(default_factory=dict)
    """Options of `soundshard featurise`."""
    train: dict[str, Any] = field(default_factory=dict)
    """Options of `soundshard train`."""
    generate: dict[str, Any] = field(default_factory=dict)
    """Options of `soundshard generate`."""


def run(config: DemoConfig) -> Path:
    """Run every stage on clips made by program (or your own), then write a page with the results."""
    out = storage.only_local(config.out, option="out")
    announce(config)
    ran = run_steps(plan_steps(config), out / "steps")  # synth, reencode, standin, featurise, train, generate
    heard = hear(out)
    page = write_page(page_data(out, ran, heard, shown=config.page_clips), out / "page.html")
    print(f"\npage: {page.resolve()}\n{results_line(out, ran, heard)}", flush=True)
    return page


def announce(config: DemoConfig) -> None:
    """Say which networks will run. With `weights=published` their files must be there before anything starts."""
    if config.weights == "published":
        for name in PUBLISHED.values():
            print(f"demo: {name}: {resolve(name)}", flush=True)
    else:
        print(f"demo: small stand-in networks are fitted on the clips in place of the published ones. For these: {HOW_TO_PUBLISHED}", flush=True)


def plan_steps(config: DemoConfig) -> list[Step]:
    """The commands, in order."""
    out = storage.only_local(config.out, option="out")
    clips, media, networks, features, trained, generated = (out / name for name in ("clips", "media", "networks", "features", "run", "generated"))
    weights = PUBLISHED if config.weights == "published" else {name: networks / f"{name}.safetensors" for name in PUBLISHED}
    networks_used = {"tower.weights": weights["tower"]} | ({"codec.weights": weights["codec"]} if config.weights == "standin" else {})
    source = {"source": config.source, **held_out(config.source)} if config.source else {"source": clips}
    steps = [
        make_step("synth", {"out": clips, **config.synth}, product=clips / "contacts.json"),
        make_step("reencode", {**source, "out": media, **config.reencode}, product=media / "manifest.parquet"),
        make_step("standin", {"data": media, "out": networks, **config.standin}, product=networks / "codec.safetensors"),
        make_step("featurise", {"data": media, "out": features, **networks_used, **config.featurise}, product=features / "manifest.parquet"),
        make_step("train", {"data": features, "out": trained, **config.train}, product=trained / "model.safetensors"),
        make_step("generate", {"run": trained, "data": media, "out": generated, **config.generate}, product=generated / "ledger.parquet"),
    ]
    unneeded = {"synth"} if config.source else set()
    unneeded |= {"standin"} if config.weights == "published" else set()
    return [step for step in steps if step.job not in unneeded]


def held_out(source: str) -> dict[str, float]:
    """Which parts of one's own clips to hold out: a tenth each, and one clip at least. Nothing where a csv says it already."""
    clips = discover(DiscoverConfig(source))
    if any(clip.split != DiscoverConfig.split for clip in clips):
        return {}
    if len(clips) < 3:
        raise ValueError(f"source={source} has {len(clips)} clips; the demo needs 3 clips or more: to train on, to validate on and to try")
    part = round(max(0.1, 1 / len(clips)), 4)
    return {"validation_fraction": part, "test_fraction": part}


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.demo`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not any(argument.startswith("config=") for argument in arguments):
        arguments = ["config=demo", *arguments]
    return job_main(DemoConfig, run, arguments, command="demo")


if __name__ == "__main__":
    sys.exit(main())
