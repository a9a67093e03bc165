"""Shared fixtures. `SHARED` is the folder of reference material beside the checkout; tests that need it skip where it is absent."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference material, or a skip."""
    if not (SHARED / "reference").is_dir():
        pytest.skip(f"no reference material at {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
