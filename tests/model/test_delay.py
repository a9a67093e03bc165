from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.delay import delay, delay_mask, undelay, undelay_logits

SPECIAL = 1024


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "goldens" / "delay.npz") as numbers:
        return {name: torch.from_numpy(numbers[name]) for name in numbers.files}


@pytest.mark.parametrize("q", [9, 4])
def test_sequences_are_those_of_the_reference(golden: dict[str, Tensor], q: int) -> None:
    codes = golden[f"nq{q}_codes"]
    steps = codes.shape[-1]
    sequence = delay(codes, SPECIAL)
    assert sequence.shape[-1] == golden[f"nq{q}_layout_len"] and q - 1 == golden[f"nq{q}_max_delay"]
    assert torch.equal(sequence, golden[f"nq{q}_build_full"])
    assert torch.equal(delay_mask(q, steps), golden[f"nq{q}_build_full_mask"])
    assert torch.equal(sequence[..., : steps + 1], golden[f"nq{q}_build_valid"])
    positions = delay(torch.arange(q * steps).view(1, q, steps), q * steps)
    assert torch.equal(positions[0], golden[f"nq{q}_build_full_indexes"])
    first = [int((positions[0] == t).nonzero()[0, 1]) for t in range(steps)]
    assert first == golden[f"nq{q}_first_step_with_timestep"].tolist()


@pytest.mark.parametrize("q", [9, 4])
def test_training_feeds_all_but_the_last_step(golden: dict[str, Tensor], q: int) -> None:
    fed = golden[f"nq{q}_codes"].clone()
    fed[..., -1] = SPECIAL
    sequence = delay(fed, SPECIAL)
    assert torch.equal(sequence, golden[f"nq{q}_build_train"])
    assert torch.equal(sequence[0] != SPECIAL, golden[f"nq{q}_build_train_mask"])


@pytest.mark.parametrize("q", [9, 4])
def test_reverting_is_that_of_the_reference(golden: dict[str, Tensor], q: int) -> None:
    codes = golden[f"nq{q}_codes"]
    steps = codes.shape[-1]
    sequence = delay(codes, SPECIAL)
    assert torch.equal(undelay(sequence, steps), golden[f"nq{q}_revert"])
    cut = undelay(sequence[..., :4], steps)
    assert torch.equal(cut, golden[f"nq{q}_revert_first4"])
    assert torch.equal(cut[0] != -1, golden[f"nq{q}_revert_first4_mask"])
    length = steps + q
    indexes = undelay(torch.arange(q * length).view(1, q, length), steps)[0]
    assert torch.equal(indexes, golden[f"nq{q}_revert_indexes"])


@pytest.mark.parametrize("q", [9, 4])
def test_logits_go_back_to_the_codes_that_they_score(golden: dict[str, Tensor], q: int) -> None:
    expected = golden[f"nq{q}_revert_logits_of_arange"]
    steps = expected.shape[-1]
    length = steps + q
    flat = torch.arange(q * length, dtype=torch.float32).view(q, length)
    logits = torch.stack([flat, -flat])[None].permute(0, 3, 2, 1)
    assert torch.equal(undelay_logits(logits, steps).permute(0, 3, 1, 2), expected)


def test_against_the_definition_one_code_at_a_time() -> None:
    b, q, t = 2, 3, 5
    codes = torch.randint(7, (b, q, t))
    expected = torch.full((b, q, t + q), 7)
    for sample in range(b):
        for k in range(q):
            for step in range(t):
                expected[sample, k, step + k + 1] = codes[sample, k, step]
    assert torch.equal(delay(codes, 7), expected)
    assert torch.equal(undelay(expected, t), codes)
    assert torch.equal(delay_mask(q, t), expected[0] != 7)
