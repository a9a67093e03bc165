"""Format, lint, types and the direction of imports, checked by the same command as everything else."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

CHECKS = {
    "format": [str(BIN / "ruff"), "format", "--check", "."],
    "lint": [str(BIN / "ruff"), "check", "."],
    "imports": [str(BIN / "lint-imports")],
    "types": [str(BIN / "pyright"), "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "types" else ()) for name in CHECKS])
def test_check(name: str) -> None:
    done = subprocess.run(CHECKS[name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(CHECKS[name])}\n{done.stdout}\n{done.stderr}"
