"""Generation speed: sequence steps per second of the engine against the memory's own speed, against the sound's, and against recomputing the prefix.

    python -m tests.benchmarks.generation [size=small|full] [batch=1,16] [guidance=1.0,6.0] [precision=fp32|bf16] [weights=as_is|int8]
        [graph=auto|off|cuda|compile] [device=cpu|cuda] [steps=0] [rounds=3] [threads=0] [uncached=true] [loss=false]

A step must read every weight once, however many samples go through it, so the floor is the weights' bytes over the device's bandwidth. Two
are measured over up to half a gigabyte of them: a copy (bytes read and written, which is how memory is usually rated) and the best pure read (a sum,
or the product of a matrix with a vector, whichever is faster). Fractions are given of the copy's floor and of the larger bandwidth's, which cannot
flatter. Each round runs bandwidths and cases one after another, so that a busy machine slows them alike; ratios are taken within a round, and the
results are medians over rounds. Steps are taken around the middle of a window, without its prefill; recomputing is timed there. `loss=true` adds
what int8 changes in the scores. The last line is JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.engine import Engine, EngineOptions
from model.generate import RecomputedLogits
from model.sampling import Sampling, choose
from model.vaura import Vaura, VauraConfig

SIZES = {
    "small": (VauraConfig(layers=4, width=256, heads=4, visual_width=64, codebooks=8, steps_per_token=6), 75.0),
    "full": (VauraConfig(), 44100 / 512),
}
"""Sizes and their codecs' rates: EnCodec 24 kHz, DAC 44.1 kHz."""
MIDDLE = 110
"""A sequence step in the middle of the published window."""
OPTIONS = {
    "size": "small",
    "batch": "1,16",
    "guidance": "1.0,6.0",
    "precision": "fp32",
    "weights": "as_is",
    "graph": "auto",
    "device": "cpu",
    "steps": "0",
    "rounds": "3",
    "threads": "0",
    "uncached": "true",
    "loss": "false",
}


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of `work`, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


class Memory:
    """Blocks of bytes to copy and to read, as many as the weights have up to half a gigabyte."""

    def __init__(self, size_bytes: int, device: str) -> None:
        self.device, count = device, min(size_bytes, 1 << 29) // 4
        # Rows of a power of two would meet in the same cache sets.
        self.matrix = torch.ones(count // 1536, 1536, device=device)
        self.target, self.vector = torch.empty_like(self.matrix), torch.ones(1536, device=device)

    @torch.inference_mode()
    def bandwidths(self) -> dict[str, float]:
        """Bytes per second, each the best of five."""
        size = self.matrix.numel() * 4
        works: dict[str, tuple[int, Callable[[], object]]] = {
            "copy": (2 * size, lambda: self.target.copy_(self.matrix)),
            "sum": (size, lambda: self.matrix.sum()),
            "product": (size, lambda: torch.mv(self.matrix, self.vector)),
        }
        rates = {name: moved / min(seconds(work, self.device) for _ in range(5)) for name, (moved, work) in works.items()}
        return {"copy": rates["copy"], "read": max(rates["sum"], rates["product"])}


@dataclass(frozen=True)
class Case:
    """A batch size and a way to sample."""

    batch: int
    sampling: Sampling

    @property
    def name(self) -> str:
        """How the figures call it."""
        return f"batch {self.batch}" + (", guided" if self.sampling.guided else "")

    @torch.inference_mode()
    def steps_per_s(self, engine: Engine, steps: int) -> float:
        """Sequence steps per second of as many around the middle of a window; each gives a codec step for every sample of the batch."""
        config, start = engine.config, MIDDLE - steps // 2
        features = torch.randn(self.batch, config.window_tokens, config.feature_width).to(engine.device, engine.dtype)
        uniform = torch.rand(self.batch, config.codebooks, 2 * MIDDLE + config.codebooks)
        run = engine.begin(features, steps=2 * MIDDLE, sampling=self.sampling, uniform=uniform)
        # Where it begins does not change what a step costs, only what the cache holds: nothing is filled in.
        run.position = start
        run._buffers.index.fill_(start)
        run._buffers.sequence[..., : start + 1].clamp_(min=0)
        took = seconds(lambda: run.advance(steps), engine.device.type)
        run.close()
        return steps / took

    @torch.inference_mode()
    def uncached_steps_per_s(self, model: Vaura, steps: int) -> float:
        """The same, from the whole prefix each time."""
        config, like = model.config, model.norm.weight
        rows = self.batch * (1 + self.sampling.guided)
        next_logits = RecomputedLogits(model, torch.randn(rows, config.window_tokens, config.feature_width).to(like))
        sequence = torch.randint(config.card, (rows, config.codebooks, MIDDLE + 1), device=like.device)
        uniform = torch.rand(self.batch, config.codebooks, device=like.device)
        return 1 / min(seconds(lambda: choose(next_logits(sequence, MIDDLE + 1), uniform, self.sampling), like.device.type) for _ in range(steps))


def heads_that_differ(model: Vaura) -> None:
    """Heads begin at zero, which would make every code equally likely."""
    for name, parameter in model.named_parameters():
        if name.startswith("lm_heads."):
            torch.nn.init.normal_(parameter, std=0.05)


def int8_loss(model: Vaura) -> dict[str, float]:
    """What int8 changes in the scores of 24 steps: absolute differences, divergence in nats, how often the most likely code stays."""
    config, like = model.config, model.norm.weight
    features = torch.randn(2, config.window_tokens, config.feature_width).to(like)
    sequence = torch.randint(config.card, (2, config.codebooks, 24), device=like.device)
    scores = [Engine(model, EngineOptions(weights=w, graph="off")).score(features, sequence, prefill=1).float() for w in ("as_is", "int8")]
    exact, rounded = (torch.log_softmax(s, -1) for s in scores)
    return {
        "deviation_of_logits": round(scores[0].std(-1).mean().item(), 4),
        "max_difference": round((scores[0] - scores[1]).abs().max().item(), 4),
        "mean_difference": round((scores[0] - scores[1]).abs().mean().item(), 5),
        "divergence_nats": round((exact.exp() * (exact - rounded)).sum(-1).mean().item(), 6),
        "same_most_likely": round((exact.argmax(-1) == rounded.argmax(-1)).float().mean().item(), 4),
    }


def main(argv: list[str]) -> None:
    """Measure and print."""
    given = dict(argument.split("=", 1) for argument in argv)
    if unknown := given.keys() - OPTIONS.keys():
        raise ValueError(f"unknown option {', '.join(unknown)}; expected {', '.join(OPTIONS)}")
    options = OPTIONS | given
    if int(options["threads"]):
        torch.set_num_threads(int(options["threads"]))
    torch.manual_seed(0)
    (config, rate), device = SIZES[options["size"]], options["device"]
    slow = options["size"] == "full" and device == "cpu"
    steps = int(options["steps"]) or (12 if slow else MIDDLE)
    model = Vaura(config).to(device, {"fp32": torch.float32, "bf16": torch.bfloat16}[options["precision"]]).eval()
    heads_that_differ(model)
    engine = Engine(model, EngineOptions(weights=options["weights"], graph=options["graph"]))
    memory = Memory(engine.weight_bytes(), device)
    guidances = [float(g) for g in options["guidance"].split(",")]
    cases = [Case(int(batch), Sampling(guidance=guidance)) for batch in options["batch"].split(",") for guidance in guidances]
    # Recomputing many samples of the full size takes minutes a step on a CPU.
    uncached = [case for case in cases if options["uncached"] == "true" and (case.batch == 1 or not slow)]
    rounds = []
    for number in range(int(options["rounds"]) + 1):
        figures = memory.bandwidths()
        for case in cases:
            figures[case.name] = case.steps_per_s(engine, steps if case.batch == 1 or not slow else max(2, steps // 4))
        for case in uncached:
            figures[f"uncached {case.name}"] = case.uncached_steps_per_s(model, 1 if slow else 4)
        print(f"round {number}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
        rounds.append(figures)
    rounds = rounds[1:]  # The first warms up, compiles and records.

    def median(figure: Callable[[dict[str, float]], float], digits: int = 2) -> float:
        return round(statistics.median(map(figure, rounds)), digits)

    size = engine.weight_bytes()
    result = {
        "benchmark": "generation",
        **{name: options[name] for name in ("size", "device", "precision", "weights")},
        "graph": engine.graph,
        "threads": torch.get_num_threads(),
        "weight_megabytes": round(size / 1e6, 1),
        "gigabytes_per_s": {name: median(lambda r, name=name: r[name] / 1e9) for name in ("copy", "read")},
        "floor_steps_per_s": median(lambda r: max(r["copy"], r["read"]) / size),
        "cases": {
            case.name: {
                "steps_per_s": median(lambda r, case=case: r[case.name]),
                "times_real_time": median(lambda r, case=case: r[case.name] * case.batch / rate),
                "of_copy_floor": median(lambda r, case=case: r[case.name] * size / r["copy"], 3),
                "of_floor": median(lambda r, case=case: r[case.name] * size / max(r["copy"], r["read"]), 3),
                "times_uncached": median(lambda r, case=case: r[case.name] / r[f"uncached {case.name}"]) if case in uncached else None,
            }
            for case in cases
        },
    }
    if options["loss"] == "true":
        result["int8_loss"] = int8_loss(model)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
