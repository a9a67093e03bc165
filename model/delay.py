"""The delay pattern: codebook k of a codec step is predicted k sequence steps later (Copet et al. 2023, sec. 2.2).

Sequence step 0 holds the special token in every codebook; step s > 0 holds in row k the code of codec step s - 1 - k, or the special token
where there is none. T codec steps of q codebooks make a sequence of T + q. Knows integers in tensors and nothing of the model.
"""

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


def _codec_step(codebooks: int, length: int, device: torch.device | None = None) -> Int[Tensor, "{codebooks} {length}"]:
    """The codec step that row k holds at sequence step s: s - 1 - k, out of range where it holds the special token."""
    return torch.arange(length, device=device) - 1 - torch.arange(codebooks, device=device)[:, None]


def delay_mask(codebooks: int, steps: int, *, device: torch.device | None = None) -> Bool[Tensor, "{codebooks} {steps+codebooks}"]:
    """Where the sequence of `steps` codec steps holds a code and not the special token."""
    at = _codec_step(codebooks, steps + codebooks, device)
    return (at >= 0) & (at < steps)


def delay(codes: Int[Tensor, "b q t"], special: int) -> Int[Tensor, "b q t+q"]:
    """The codes on the sequence's grid, `special` where there is no code."""
    _, q, t = codes.shape
    at = _codec_step(q, t + q, codes.device)
    spread = codes.gather(-1, at.clamp(0, t - 1).expand(len(codes), -1, -1))
    return torch.where((at >= 0) & (at < t), spread, special)


def undelay(sequence: Int[Tensor, "b q s"], steps: int, *, missing: int = -1) -> Int[Tensor, "b q {steps}"]:
    """The codes of `steps` codec steps, read back from a sequence; `missing` where a cut-off sequence does not reach them."""
    length = sequence.shape[-1]
    at = _sequence_step(sequence.shape[1], steps, sequence.device) + 1
    codes = sequence.gather(-1, at.clamp(max=length - 1).expand(len(sequence), -1, -1))
    return torch.where(at < length, codes, missing)


def undelay_logits(logits: Shaped[Tensor, "b s q card"], steps: int) -> Shaped[Tensor, "b q {steps} card"]:
    """The logits that score each code: those at sequence step s are for the codes at step s + 1, so code (k, t) finds its own at t + k."""
    b, _, q, card = logits.shape
    at = _sequence_step(q, steps, logits.device)
    return logits.transpose(1, 2).gather(2, at[None, :, :, None].expand(b, q, steps, card))


def _sequence_step(codebooks: int, steps: int, device: torch.device) -> Int[Tensor, "{codebooks} {steps}"]:
    return torch.arange(steps, device=device) + torch.arange(codebooks, device=device)[:, None]
