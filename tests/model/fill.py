"""Deterministic weights and inputs: a tensor's name and shape give its values.

The goldens were made by running the reference implementations with these weights, so a test needs no weights file. The rules are tried
in the order written here; all arithmetic is float64, rounded once.
"""

import math
import zlib

import numpy as np
import torch
from torch import Tensor, nn


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return _generator(name).standard_normal(shape)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight called `name` in the published file (without `module.`)."""
    if shape == ():
        return np.array(0.07, np.float32)
    last = name.rpartition(".")[2]
    if last == "weight_g":
        mean, std = 0.7, 0.07
    elif last == "alpha":
        mean, std = 1.0, 0.1
    elif last == "bias" or last.endswith("_bias"):
        mean, std = 0.0, 0.02
    elif len(shape) == 1:
        mean, std = 1.0, 0.1
    elif shape[0] == 1 and last != "weight_v":
        mean, std = 0.0, 0.5
    else:
        mean, std = 0.0, 1.4 / math.sqrt(math.prod(shape[1:]))
    return (mean + std * normal(name, shape)).astype(np.float32)


def inp(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    return torch.from_numpy((normal("input:" + name, shape) * scale).astype(np.float32))


def inp_int(name: str, shape: tuple[int, ...], high: int) -> Tensor:
    return torch.from_numpy(np.floor(_generator("input:" + name).random(shape) * high).astype(np.int64))


def checksum(x: np.ndarray) -> np.ndarray:
    """Mean, deviation, mean size and a random projection: what a golden keeps of a tensor too large to store."""
    x = np.asarray(x, np.float64).ravel()
    return np.array([x.mean(), x.std(), np.abs(x).mean(), (x * normal("probe", (x.size,))).sum() / math.sqrt(x.size)])


def fill_module(module: nn.Module, prefix: str = "") -> None:
    """Fills every entry of a module's state, named `prefix` + its own name. Half-precision entries are the float32 values, rounded."""
    state = {name: torch.from_numpy(fill(prefix + name, tuple(t.shape))).to(t.dtype) for name, t in module.state_dict().items()}
    module.load_state_dict(state)
