"""Training speed: samples per second of a whole step, and what part of the device's matrix rate the model's own operations reach.

    python -m tests.benchmarks.training [size=small|medium|full] [batch=4] [rounds=5] [steps=2] [device=cpu] [precision=32-true|bf16-mixed]
        [compile=false] [accumulate=1] [checkpoint_activations=false] [ema=false] [against=] [profile=false] [threads=0]

A step is forward, backward, clipping and AdamW as training takes them, on data that is already there (tests/benchmarks/step_wait.py has the wait for
data). The model's operations are `forward_flops`, three times; recomputed ones are work, but not the model's. They are set against the rate of a bare
matrix product of the same precision, as large as the model's own largest, measured in the same round; the rate that the maker gives for the device is
printed too where it is known. `against=compile,ema,bf16` also times steps with these options turned over, each in a model of its own, and gives the
ratio of its seconds to the plain step's in the same round. Results are medians over rounds. The full size takes 12 GB on a CPU. Last line: JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from model.vaura import Vaura, VauraConfig, forward_flops
from train.optim import OptimiserConfig, build_optimiser, clip_gradients

SIZES = {
    "small": VauraConfig(layers=4, width=256, heads=4, visual_width=64, codebooks=8, steps_per_token=6),
    "medium": VauraConfig(layers=6, width=768, heads=8, visual_width=256, codebooks=8, steps_per_token=6),
    "full": VauraConfig(),
}
STEPS = {"small": 192, "medium": 192, "full": 221}
"""Codec steps of a training window: EnCodec's, and the published model's."""
PEAKS = {"H100 80GB": 989.4, "H100 SXM": 989.4, "H200": 989.4, "H100 PCIe": 756.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "RTX 4090": 165.2}
"""Teraflop/s of dense bf16 with fp32 accumulation, as the makers give them, by what the device's name contains."""


@dataclass(frozen=True)
class Options:
    """What a step may have beyond the plain one."""

    precision: str = "32-true"
    compile: bool = False
    accumulate: int = 1
    checkpoint_activations: bool = False
    ema: bool = False

    def turned(self, name: str) -> "Options":
        """The same with one option turned over."""
        if name == "bf16":
            return replace(self, precision="32-true" if self.precision == "bf16-mixed" else "bf16-mixed")
        return replace(self, **{name: not getattr(self, name)})


class Step:
    """One optimiser step, in pieces that can be timed."""

    def __init__(self, config: VauraConfig, batch: int, device: str, options: Options) -> None:
        with torch.device(device):
            self.model = Vaura(config).train()
        self.model.checkpoint_activations = options.checkpoint_activations
        self.accumulate, self.half = options.accumulate, options.precision == "bf16-mixed"
        self.optimiser = build_optimiser(self.model.parameters(), OptimiserConfig())
        self.average = [p.detach().clone() for p in self.model.parameters()] if options.ema else []
        steps = STEPS["full"] if config.codebooks == 9 else STEPS["small"]
        self.codes = torch.randint(config.card, (batch, config.codebooks, steps), device=device)
        self.features = torch.randn(batch, config.window_tokens, config.feature_width, device=device)
        self.loss = self.features.sum()
        # Hooks on what is saved are not for compiled code, so this comes first.
        self.saved_megabytes = saved_megabytes(self)
        if options.compile:
            for layer in self.model.layers:
                layer.compile(dynamic=False)

    def __call__(self) -> None:
        """The whole step."""
        for _ in range(self.accumulate):
            self.forward()
            self.backward()
        self.update()

    def forward(self) -> None:
        with self._precision():
            self.loss = self.model.training_loss(self.codes, self.features).total / self.accumulate

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        clip_gradients(self.model.parameters(), OptimiserConfig())
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 0.001)

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.features.device.type, torch.bfloat16) if self.half else nullcontext()


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of `work`, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def matmul_rate(config: VauraConfig, positions: int, device: str, precision: str) -> float:
    """Flop/s of the feed-forward's product alone, for all of a batch's positions; best of five."""
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    x = torch.randn(positions, config.width, device=device, dtype=dtype)
    weight = torch.randn(config.feed_forward_width, config.width, device=device, dtype=dtype)
    work = 2 * x.numel() * config.feed_forward_width
    times = max(1, int(2e9 / work)) if device == "cpu" else 20
    return times * work / min(timed(lambda: [x @ weight.T for _ in range(times)], device) for _ in range(5))


def measure(step: Step, others: dict[str, Step], steps: int, rounds: int, device: str, precision: str) -> list[dict[str, float]]:
    """For each round: a bare product's flop/s, seconds of a step, of its parts when each is waited for, and of other steps."""
    samples = []
    for number in range(rounds + 1):
        figures = {
            "matmul": matmul_rate(step.model.config, len(step.codes) * (step.codes.shape[-1] + step.model.config.codebooks - 1), device, precision)
        }

        figures["step"] = timed(partial(several, step, steps), device) / steps
        figures["forward"] = timed(step.forward, device) * step.accumulate
        figures["backward"] = timed(step.backward, device) * step.accumulate
        figures["update"] = timed(step.update, device)
        for name, other in others.items():
            figures[name] = timed(partial(several, other, steps), device) / steps
        print(f"round {number}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
        samples.append(figures)
    return samples[1:]  # The first warms up, and compiles.


def several(work: Callable[[], object], times: int) -> None:
    """The work, again and again."""
    for _ in range(times):
        work()


def saved_megabytes(step: Step) -> float:
    """What the forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step.forward()
    return sum(kept.values()) / 1e6


def print_profile(step: Step, device: str) -> None:
    """What the step's time is made of, by operation."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * device.startswith("cuda")
    with torch.profiler.profile(activities=activities) as profile:
        step()
    order = "self_cuda_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))


def main(argv: list[str]) -> None:
    """Measure and print."""
    options = {
        "size": "small", "batch": "4", "rounds": "5", "steps": "2", "device": "cpu", "precision": "32-true", "compile": "false",
        "accumulate": "1", "checkpoint_activations": "false", "ema": "false", "against": "", "profile": "false",
        "threads": "0",
    }  # fmt: skip
    given = dict(argument.split("=", 1) for argument in argv)
    if unknown := given.keys() - options.keys():
        raise ValueError(f"unknown option {', '.join(unknown)}; expected {', '.join(options)}")
    options |= given
    if int(options["threads"]):
        torch.set_num_threads(int(options["threads"]))
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    config, device, precision = SIZES[options["size"]], options["device"], options["precision"]
    batch, accumulate = int(options["batch"]), int(options["accumulate"])
    switches = {name: options[name] == "true" for name in ("compile", "checkpoint_activations", "ema")}
    chosen = Options(precision=precision, accumulate=accumulate, **switches)
    step = Step(config, batch, device, chosen)
    others = {name: Step(config, batch, device, chosen.turned(name)) for name in options["against"].split(",") if name}
    rounds = measure(step, others, int(options["steps"]), int(options["rounds"]), device, precision)
    if options["profile"] == "true":
        print_profile(step, device)
    positions = step.codes.shape[-1] + config.codebooks - 1
    work = 3 * batch * accumulate * forward_flops(config, positions, config.window_tokens)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    peak = next((tera for card, tera in PEAKS.items() if card in name), None) if precision == "bf16-mixed" else None

    def median(figure: Callable[[dict[str, float]], float], digits: int = 4) -> float:
        return round(statistics.median(map(figure, rounds)), digits)

    result = {
        "benchmark": "training",
        **{key: options[key] for key in ("size", "precision", "compile", "checkpoint_activations", "ema")},
        "device": name,
        "batch": batch,
        "accumulate": accumulate,
        "threads": torch.get_num_threads(),
        "parameters_millions": round(sum(p.numel() for p in step.model.parameters()) / 1e6, 1),
        "gigaflop_per_sample": round(work / batch / accumulate / 1e9, 1),
        "samples_per_s": median(lambda r: batch * accumulate / r["step"]),
        "seconds": {part: median(lambda r, part=part: r[part]) for part in ("step", "forward", "backward", "update")},
        "seconds_relative_to_this": {name: median(lambda r, name=name: r[name] / r["step"], 3) for name in others},
        "saved_activation_megabytes": {name: round(each.saved_megabytes, 1) for name, each in {"this": step, **others}.items()},
        "peak_memory_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.startswith("cuda") else None,
        "teraflop_per_s": median(lambda r: work / r["step"] / 1e12),
        "matmul_teraflop_per_s": median(lambda r: r["matmul"] / 1e12),
        "fraction_of_matmul": median(lambda r: work / r["step"] / r["matmul"], 3),
        "peak_teraflop_per_s": peak,
        "fraction_of_peak": None if peak is None else median(lambda r: work / r["step"] / 1e12 / peak, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
