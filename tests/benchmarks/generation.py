"""Generation speed: sequence steps per second with and without the key-value cache, with and without guidance, against the memory's own speed.

    python -m tests.benchmarks.generation [size=small|full] [steps=192] [rounds=5] [device=cpu] [precision=fp32|bf16] [threads=0] [batch=1]

One step of one sample must read every weight once, so the floor is the weights' bytes over the bandwidth of a copy of as many bytes. Each round runs
the bandwidth and all cases one after another, so that a busy machine slows them alike; ratios are taken within a round, and the results are medians
over rounds. The last line is JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from model.generate import Sampling, generate
from model.vaura import Vaura, VauraConfig

SIZES = {
    "small": VauraConfig(layers=4, width=256, heads=4, visual_width=64, codebooks=8, steps_per_token=6),
    "full": VauraConfig(),
}
CASES = {"cached": (True, 1.0), "uncached": (False, 1.0), "cached_guided": (True, 3.0), "uncached_guided": (False, 3.0)}


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of `work`, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def weight_bytes(model: Vaura) -> int:
    """Bytes of the weights that every step multiplies with; of the embedding tables it reads only rows."""
    names = ("layers.", "norm.", "lm_heads.")
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name.startswith(names))


def bandwidth(size_bytes: int, device: str) -> float:
    """Bytes per second, read and written, of copying as many bytes as the weights have; best of ten copies."""
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size_bytes / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def measure(model: Vaura, steps: int, rounds: int, batch: int, device: str) -> list[dict[str, float]]:
    """For each round: bytes/s of a copy, and each case's steps/s."""
    like = model.norm.weight
    features = torch.randn(batch, model.config.window_tokens, model.config.feature_width).to(like)
    sequence_steps = steps + model.config.codebooks - 1
    samples = []
    for round_number in range(rounds + 1):
        figures = {"bandwidth": bandwidth(weight_bytes(model), device)}
        for name, (cache, guidance) in CASES.items():
            sampling, seeds = Sampling(guidance=guidance), list(range(batch))
            took = seconds(lambda: generate(model, features, steps=steps, sampling=sampling, seeds=seeds, cache=cache), device)  # noqa: B023
            figures[name] = sequence_steps / took
        print(f"round {round_number}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
        samples.append(figures)
    return samples[1:]  # The first warms up.


def main(argv: list[str]) -> None:
    """Measure and print."""
    options = {"size": "small", "steps": "", "rounds": "5", "device": "cpu", "precision": "fp32", "threads": "0", "batch": "1"}
    given = dict(argument.split("=", 1) for argument in argv)
    if unknown := given.keys() - options.keys():
        raise ValueError(f"unknown option {', '.join(unknown)}; expected {', '.join(options)}")
    options |= given
    if int(options["threads"]):
        torch.set_num_threads(int(options["threads"]))
    torch.manual_seed(0)
    config, device, batch = SIZES[options["size"]], options["device"], int(options["batch"])
    # Without the cache, the full size takes seconds a step on a CPU.
    steps = int(options["steps"] or (24 if options["size"] == "full" and device == "cpu" else 192))
    model = Vaura(config).to(device, {"fp32": torch.float32, "bf16": torch.bfloat16}[options["precision"]]).eval()
    for name, parameter in model.named_parameters():
        if name.startswith("lm_heads."):
            torch.nn.init.normal_(parameter, std=0.05)
    rounds = measure(model, steps, int(options["rounds"]), batch, device)

    def median(figure: Callable[[dict[str, float]], float], digits: int = 2) -> float:
        return round(statistics.median(map(figure, rounds)), digits)

    result = {
        "benchmark": "generation",
        **{name: options[name] for name in ("size", "device", "precision")},
        "batch": batch,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "weight_megabytes": round(weight_bytes(model) / 1e6, 1),
        "copy_gigabytes_per_s": median(lambda r: r["bandwidth"] / 1e9),
        "steps_per_s": {name: median(lambda r, name=name: r[name]) for name in CASES},
        "cache_speedup": median(lambda r: r["cached"] / r["uncached"]),
        "cache_speedup_guided": median(lambda r: r["cached_guided"] / r["uncached_guided"]),
        "floor_steps_per_s": median(lambda r: r["bandwidth"] / weight_bytes(model)),
        "fraction_of_floor": {
            name: median(lambda r, name=name: r[name] * weight_bytes(model) / r["bandwidth"], 3) for name in CASES if "un" not in name
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
