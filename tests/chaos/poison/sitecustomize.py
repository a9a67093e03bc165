"""Put on PYTHONPATH by the chaos runs: in the process that decodes, clips with certain names crash, hang or eat all memory inside `av.open`.

No file is known that does this to the decoder of today, so the fault is planted where it would occur: in the child, below our own code.
"""

import ctypes
import os
import sys
import time

if any("pipeline.isolate" in argument or argument.endswith("isolate.py") for argument in sys.orig_argv):
    import av

    healthy_open = av.open

    def poisoned_open(file, *arguments, **options):
        """As `av.open`, except for clips that are called after what they do."""
        name = os.path.basename(str(getattr(file, "name", file)))
        if name.startswith("segfault"):
            ctypes.string_at(0)
        if name.startswith("hang"):
            ctypes.CDLL(None).pause()
            time.sleep(10_000)
        if name.startswith("hog"):
            hoard = []
            while True:
                hoard.append(bytearray(64 << 20))
        return healthy_open(file, *arguments, **options)

    av.open = poisoned_open
