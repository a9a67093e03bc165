"""The console command: `soundshard <job> [config=FILE] [key=value ...]`. Knows the jobs' names, and imports only the one that is asked for."""

import importlib
import sys
from collections.abc import Sequence

JOBS: dict[str, tuple[str, str]] = {
    "demo": ("pipeline.demo", "the whole path on small clips made by program, ending in a page to look at"),
    "prepare": ("pipeline.prepare", "clips -> media shards -> feature shards (reencode, then featurise)"),
    "reencode": ("pipeline.reencode", "clips -> media shards: H.264 25 fps and AAC on one clock"),
    "featurise": ("pipeline.featurise", "media shards -> feature shards: Segment-AVCLIP features and codec tokens"),
    "bench-prepare": ("pipeline.bench_prepare", "clips -> what preparing one costs on this machine, as a file of rates"),
    "plan": ("pipeline.estimate", "rates and a cluster's description -> how long and how large a preparation will be"),
    "subset": ("pipeline.subset", "some clips of a dataset as a view, or as shards of their own: VisualSound, a class list, a threshold"),
    "score": ("pipeline.score", "columns about every clip of a dataset: loudness, speech, cuts, similarity, synchronisation"),
    "curate": ("pipeline.curate", "what a threshold on a score would keep: a table and a page"),
    "verify": ("shards.verify", "every byte of a dataset against its ledgers; repair what can be"),
    "train": ("train.vaura", "feature shards -> a run folder with a V-AURA model"),
    "train.sync": ("train.sync", "Synchformer: stage=1 both towers, stage=2 the offset, stage=3 whether there is one"),
    "generate": ("pipeline.generate", "a run folder and videos -> the videos with generated sound"),
    "sync": ("pipeline.sync", "by how much a video's sound and pictures are apart; along it, for many, and put right"),
    "evaluate.sync": ("pipeline.evaluate_sync", "a Synchformer and a media or feature dataset -> the published tables' rows, with intervals"),
    "app": ("pipeline.app", "a page in the browser on which a video gets new sound"),
    "inspect": ("pipeline.inspect", "what a dataset holds: counts, failures by reason, sizes, provenance; one sample; a page with clips that play"),
    "weights": ("model.weights", "fetch published weights into the cache; make V-AURA's checkpoint a run folder"),
    "standin": ("pipeline.standin", "fit small stand-in networks from a media dataset, where published weights cannot be had"),
    "synth": ("pipeline.synth", "make clips by program, with known contact times"),
}


def usage() -> str:
    """The jobs, a line each."""
    width = max(map(len, JOBS))
    jobs = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in JOBS.items())
    return f"usage: soundshard <job> [config=FILE] [key=value ...]\n\njobs:\n{jobs}\n\n`soundshard <job> --help` lists the job's options."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the first argument names; returns its exit status. 2 for an unknown job."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] not in JOBS:
        print(f"soundshard: there is no job {arguments[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(JOBS[arguments[0]][0]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
