"""How long a frozen node (every process of it stopped) holds a job up.

    python -m tests.chaos.freeze [freeze_seconds=25] [ray_defaults=true]

30 small clips on two nodes of one processor; one is frozen in the middle of an encode. With `ray_defaults=true` Ray's own health checks keep the
settings with which they take minutes, so that what is seen is the loop's doing. The last line is JSON.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import harness
from tests.chaos.harness import Driver, Nodes, check, make_inputs, wait_for


def main(argv: list[str]) -> None:
    """Freeze, wait, print."""
    options = dict(argument.split("=") for argument in argv)
    if options.get("ray_defaults", "true") == "true":
        harness.CLUSTER = {name: value for name, value in harness.CLUSTER.items() if "health_check" not in name}
    with tempfile.TemporaryDirectory(prefix="freeze-") as folder:
        inputs, out = Path(folder, "in"), f"{folder}/out"
        expected = make_inputs(inputs, 30, bad=0)
        with Nodes(count=2) as nodes:
            settings = (
                "encode.short_side=64",
                "encode.preset=ultrafast",
                "clips_per_shard=7",
                f"freeze_seconds={options.get('freeze_seconds', '25')}",
            )
            driver = Driver("reencode", f"source={inputs}", f"out={out}", *settings, f"ray.address={nodes.cluster.address}")
            wait_for(lambda: bool(nodes.workers("ray::encode")))
            frozen = time.monotonic()
            nodes.freeze(0)
            status = driver.wait(900)
            seconds = time.monotonic() - frozen
        notes = [line for line in driver.text.splitlines() if "does not answer" in line or "has left" in line]
        print(json.dumps({"status": status, "seconds_from_freeze_to_end": round(seconds, 1), "wrong": check(out, inputs, expected), "notes": notes}))


if __name__ == "__main__":
    main(sys.argv[1:])
