"""`soundshard train.sync stage=1|2|3`: Synchformer's training, each stage with the published recipe as its defaults.

Knows which stage has which options. The stages are `train.sync_contrast` and `train.sync_pairs`.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.load import job_main, peek
from train.sync_contrast import ContrastJob, run_contrast
from train.sync_pairs import PairJob, SynchronisableJob, run_pairs

STAGES: dict[str, tuple[type, Callable[[Any], Path]]] = {
    "1": (ContrastJob, run_contrast),
    "2": (PairJob, run_pairs),
    "3": (SynchronisableJob, run_pairs),
}


def main(argv: Sequence[str] | None = None) -> int:
    """`soundshard train.sync stage=1|2|3`, `python -m train.sync`. `--help` with a stage shows its options, without one those of stage 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    schema, run = STAGES.get(peek(arguments, "stage") or "", STAGES["2"])
    return job_main(schema, run, arguments, command="train.sync")


if __name__ == "__main__":
    sys.exit(main())
