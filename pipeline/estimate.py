"""`soundshard plan`: how long and how large preparing a dataset on a cluster will be.

Arithmetic only: what a clip costs comes from `soundshard bench-prepare`, what the machines are from a cluster description, and the rest are the
constants below, which the output states. Opens no clip, starts no Ray.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from configs.load import job_main, load
from pipeline.discover import DiscoverConfig, discover
from pipeline.rates import Rates, read_rates

QUEUED_PER_WORKER = 2
"""Clips decoded ahead for each thread, and clips in flight for each processor (what `in_flight=0` does, with two shards more)."""
CALLS_PER_GPU_ACTOR = 2
"""Calls that a process with a GPU works on at once: one decodes its first clips while the other computes."""
MAX_PARTIAL_BATCHES = 0.05
"""Largest part of the segments that may be in batches that are not full, for the suggested chunk_clips."""
FILES_PER_SHARD, FILES_PER_DATASET = 2, 3
"""A tar and its ledger; dataset.json, plan.parquet and manifest.parquet."""


@dataclass(frozen=True)
class NodeGroup:
    """Machines of one kind."""

    name: str = "???"
    count: int = 1
    """Machines."""
    cpus: int = 0
    """Processors of one machine, as Ray counts them."""
    gpus: int = 0
    """GPUs of one machine."""
    gpu_kind: str = ""
    """The GPU's name as the rates file gives it."""
    memory_gb: float = 0.0
    """Memory of one machine; 0 if it is not to be checked."""
    network_mb_per_second: float = 0.0
    """What one machine can send, and as much again receive."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.cpus < 1 or self.gpus < 0 or self.network_mb_per_second <= 0:
            raise ValueError(
                f"nodes {self.name!r}: count={self.count} cpus={self.cpus} gpus={self.gpus} network_mb_per_second={self.network_mb_per_second:g}; "
                "expected at least one machine, one processor and a network rate above 0"
            )
        if self.gpus and not self.gpu_kind:
            raise ValueError(f"nodes {self.name!r} have {self.gpus} GPUs and no gpu_kind; give their name as the rates file has it")


@dataclass(frozen=True)
class Cluster:
    """A cluster description: the YAML file that `cluster=` names."""

    nodes: list[NodeGroup] = field(default_factory=list)
    """Kinds of machines."""
    storage_read_mb_per_second: float = 0.0
    """What the file system or object storage gives to all machines together."""
    storage_write_mb_per_second: float = 0.0
    """What it takes from all machines together."""

    def __post_init__(self) -> None:
        if not self.nodes or min(self.storage_read_mb_per_second, self.storage_write_mb_per_second) <= 0:
            raise ValueError("a cluster description needs nodes, storage_read_mb_per_second and storage_write_mb_per_second")

    @property
    def cpus(self) -> int:
        """Processors of all machines."""
        return sum(group.count * group.cpus for group in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs of all machines."""
        return sum(group.count * group.gpus for group in self.nodes)

    @property
    def machines(self) -> int:
        """Machines of all kinds."""
        return sum(group.count for group in self.nodes)

    @property
    def network_bytes_per_second(self) -> float:
        """What all machines together can send."""
        return sum(group.count * group.network_mb_per_second for group in self.nodes) * 1e6


@dataclass(frozen=True)
class PlanConfig(DiscoverConfig):
    """Options of `soundshard plan`: `source` (which is listed, not opened) or `clips` says how much there is to do."""

    source: str = ""
    """Clips to count, as `prepare` would find them."""
    clips: int = 0
    """Number of clips, where there is nothing to list yet."""
    rates: str = "rates.json"
    """What `soundshard bench-prepare` wrote, on a machine like the cluster's and a sample like the dataset."""
    cluster: str = "???"
    """YAML file that describes the cluster; `cluster/example_cluster` is one to copy."""
    clips_per_shard: int = 64
    """As it will be given to `prepare`."""


@dataclass(frozen=True)
class Stage:
    """How long each resource alone would take for a stage; all work at the same time, so the slowest decides."""

    name: str
    cpu_seconds: float
    gpu_seconds: float
    read_seconds: float
    write_seconds: float
    network_seconds: float

    def limits(self) -> dict[str, float]:
        """Seconds by resource."""
        return {f.name.removesuffix("_seconds"): getattr(self, f.name) for f in fields(self) if f.name != "name"}

    @property
    def seconds(self) -> float:
        """How long the stage takes."""
        return max(self.limits().values())

    @property
    def limit(self) -> str:
        """The resource that decides."""
        limits = self.limits()
        return max(limits, key=limits.__getitem__)


@dataclass(frozen=True)
class Suggestion:
    """Options of `prepare` that keep this cluster busy."""

    chunk_clips: int
    decode_threads: int
    decode_ahead: int
    fused: bool


@dataclass(frozen=True)
class Memory:
    """What one machine of a kind needs at most, in bytes."""

    reencode_bytes: float
    """A worker and its decoder for each processor."""
    featurise_bytes: float
    """The processes with the networks, their decoders, and the clips decoded ahead."""
    object_store_bytes: float
    """Its share, in Ray's object store, of the re-encoded clips whose shards are not written yet."""


@dataclass(frozen=True)
class Estimate:
    """What `plan` prints."""

    clips: int
    good: float
    reencode: Stage
    featurise: Stage
    fused: Stage
    media_bytes: float
    feature_bytes: float
    shards: int
    files: int
    suggestion: Suggestion
    memory: dict[str, Memory]
    """By kind of machine."""

    @property
    def sequential_seconds(self) -> float:
        """Both stages, one after the other."""
        return self.reencode.seconds + self.featurise.seconds


def run(config: PlanConfig) -> Estimate:
    """Say how long and how large a preparation will be, from the rates of `soundshard bench-prepare` and a description of the cluster."""
    if bool(config.source) == bool(config.clips) or config.clips < 0:
        raise ValueError(f"source={config.source!r} clips={config.clips}; expected one of them: clips to count, or their number")
    if config.clips_per_shard < 1:
        raise ValueError(f"clips_per_shard is {config.clips_per_shard}; expected at least 1")
    found = discover(config) if config.source else []
    clips = len(found) or config.clips
    absent = sum(clip.reason is not None for clip in found)
    rates, cluster = read_rates(config.rates), load(Cluster, [f"config={config.cluster}"])
    result = estimate(clips - absent, rates, cluster, clips_per_shard=config.clips_per_shard)
    if absent:
        print(f"{absent:,} of {clips:,} clips are listed but absent or duplicates; they cost nothing")
    print(text(result, rates, cluster), flush=True)
    return result


def estimate(clips: int, rates: Rates, cluster: Cluster, *, clips_per_shard: int) -> Estimate:
    """The whole arithmetic: `clips` that are there, of which as large a part fails as in the sample.

    Raises ValueError where the rates say nothing about this cluster: other GPUs, or none.
    """
    check_devices(rates, cluster)
    on_gpu = rates.device == "cuda"
    good = clips * (1 - rates.failed / rates.clips)
    gpu_seconds = rates.networks.wall_seconds if on_gpu else 0.0  # of one GPU, for a clip
    network_cpu = rates.networks.cpu_seconds  # on a GPU: cropping, copying and starting kernels
    actor_cpus = sum(group.count * group.cpus for group in cluster.nodes if group.gpus) if on_gpu else cluster.cpus
    threads = decode_threads(rates, cluster)
    # Decoding threads and the networks' own work are all that an actor's machine does while it featurises.
    decoding = good * rates.decode.cpu_seconds / (cluster.gpus * threads) if on_gpu else 0.0
    source, media, features = clips * rates.source_bytes, good * rates.media_bytes, good * rates.feature_bytes
    moved = media * (cluster.machines - 1) / cluster.machines  # from the machine that encoded a clip to the one that writes its shard
    reencode = _stage("reencode", cluster, clips * rates.reencode.cpu_seconds / cluster.cpus, 0.0, source, media, moved)
    featurise = _stage(
        "featurise",
        cluster,
        max(decoding, good * (rates.decode.cpu_seconds + network_cpu) / actor_cpus),
        good * gpu_seconds / max(cluster.gpus, 1),
        media,
        features,
        0.0,
    )
    fused_cpu = clips * rates.reencode_fused.cpu_seconds + good * network_cpu
    fused = _stage("fused", cluster, fused_cpu / actor_cpus, good * gpu_seconds / max(cluster.gpus, 1), source, media + features, moved)
    shards = math.ceil(clips / clips_per_shard)
    stored_clips = min(clips, QUEUED_PER_WORKER * cluster.cpus + 2 * clips_per_shard)
    suggestion = suggest(rates, clips_per_shard, threads, fused=fused.seconds < reencode.seconds + featurise.seconds)
    return Estimate(
        clips=clips,
        good=good,
        reencode=reencode,
        featurise=featurise,
        fused=fused,
        media_bytes=media,
        feature_bytes=features,
        shards=shards,
        files=2 * (FILES_PER_SHARD * shards + FILES_PER_DATASET),
        suggestion=suggestion,
        memory={group.name: memory(group, rates, cluster, suggestion, stored_clips) for group in cluster.nodes},
    )


def _stage(name: str, cluster: Cluster, cpu: float, gpu: float, read_bytes: float, write_bytes: float, moved_bytes: float) -> Stage:
    busiest_way = max(read_bytes, write_bytes) + moved_bytes  # machines send and receive at the same time
    return Stage(
        name=name,
        cpu_seconds=cpu,
        gpu_seconds=gpu,
        read_seconds=read_bytes / (cluster.storage_read_mb_per_second * 1e6),
        write_seconds=write_bytes / (cluster.storage_write_mb_per_second * 1e6),
        network_seconds=busiest_way / cluster.network_bytes_per_second,
    )


def check_devices(rates: Rates, cluster: Cluster) -> None:
    """Raises ValueError where the tower was measured on a GPU that the cluster does not have."""
    if rates.device != "cuda":
        return
    kinds = {group.gpu_kind for group in cluster.nodes if group.gpus}
    if kinds != {rates.gpu_kind}:
        raise ValueError(
            f"the rates are those of a {rates.gpu_kind}, and the cluster's GPUs are {', '.join(sorted(kinds)) or 'none'}; "
            "run `soundshard bench-prepare` on one of its machines"
        )


def decode_threads(rates: Rates, cluster: Cluster) -> int:
    """Decoding threads for each GPU so that decoding keeps ahead of it, as far as its machine has processors; 1 without GPUs."""
    if rates.device != "cuda":
        return 1
    wanted = math.ceil(rates.decode.cpu_seconds / rates.networks.wall_seconds)
    return max(1, min(wanted, *(group.cpus // group.gpus for group in cluster.nodes if group.gpus)))


def suggest(rates: Rates, clips_per_shard: int, threads: int, *, fused: bool) -> Suggestion:
    """Options that keep the cluster busy: clips decoded ahead, and calls that are long enough for full batches."""
    decode_ahead = QUEUED_PER_WORKER * threads
    batch = int(rates.options["tower"]["batch_segments"])
    full = math.ceil(batch / (MAX_PARTIAL_BATCHES * rates.segments))  # at most one batch of a call is not full
    return Suggestion(min(clips_per_shard, max(decode_ahead, full)), threads, decode_ahead, fused)


def memory(group: NodeGroup, rates: Rates, cluster: Cluster, suggestion: Suggestion, stored_clips: int) -> Memory:
    """What one machine of the group needs at most with the suggested options."""
    on_gpu = rates.device == "cuda"
    actors = group.gpus if on_gpu else group.cpus // int(rates.options["tower"]["threads"])
    waiting = math.ceil(int(rates.options["tower"]["batch_segments"]) / rates.segments)  # clips whose last segments wait for a full batch
    calls = CALLS_PER_GPU_ACTOR if on_gpu else 1
    buffers = calls * (suggestion.decode_ahead + waiting) * rates.decoded_bytes
    return Memory(
        reencode_bytes=float(group.cpus * (rates.worker_process_bytes + rates.decoder_process_bytes)),
        featurise_bytes=float(actors) * (rates.actor_process_bytes + calls * suggestion.decode_threads * rates.decoder_process_bytes + buffers),
        object_store_bytes=stored_clips * rates.media_bytes / cluster.machines,
    )


def text(result: Estimate, rates: Rates, cluster: Cluster) -> str:
    """The estimate for a person to read, with everything it assumes."""
    lines = [
        f"{result.clips:,} clips of {rates.video_seconds:.1f} s, {result.clips * rates.video_seconds / 3600:,.0f} h; {result.good:,.0f} of them good",
        "on " + ", ".join(_described(group) for group in cluster.nodes),
        "",
        f"{'stage':<11}" + "".join(f"{name:>11}" for name in result.reencode.limits()) + "    takes, limited by",
    ]
    for stage in (result.reencode, result.featurise, result.fused):
        lines.append(
            f"{stage.name:<11}" + "".join(f"{duration(s):>11}" for s in stage.limits().values()) + f"    {duration(stage.seconds)}, {stage.limit}"
        )
    options = result.suggestion
    lines += [
        "",
        f"both stages one after the other: {duration(result.sequential_seconds)}; fused: {duration(result.fused.seconds)}",
        f"media {_size(result.media_bytes)}, features {_size(result.feature_bytes)}: {result.shards:,} shards each, {result.files:,} files in all",
        f"suggested: chunk_clips={options.chunk_clips} decode_threads={options.decode_threads} "
        f"decode_ahead={options.decode_ahead} fused={str(options.fused).lower()} tower.device={rates.device}",
        "",
        "memory of one machine, at most (what its processes share is counted in each; Ray's object store beside them):",
    ]
    for group in cluster.nodes:
        need = result.memory[group.name]
        most = max(need.reencode_bytes, need.featurise_bytes) + need.object_store_bytes
        lines.append(
            f"  {group.name}: re-encoding {_size(need.reencode_bytes)}, featurising {_size(need.featurise_bytes)}, object store "
            f"{_size(need.object_store_bytes)}" + (f"; more than its {group.memory_gb:g} GB" if 0 < group.memory_gb * 1e9 < most else "")
        )
    return "\n".join([*lines, "", "assumed:", *(f"- {line}" for line in assumptions(rates, cluster))])


def assumptions(rates: Rates, cluster: Cluster) -> list[str]:
    """What the figures rest on."""
    lines = [
        f"rates of {rates.clips} clips on {rates.cpus} x {rates.cpu_kind}{f' and {rates.gpu_kind}' if rates.gpu_kind else ''}: the cluster's "
        "processors are as fast, with all of them busy, and the sample is like the dataset",
        f"tower at {rates.options['tower']['precision']}, {rates.options['views']} views, hop_frames={rates.options['hop_frames']}, "
        f"batches of {rates.options['tower']['batch_segments']} segments, x264 preset {rates.options['encode']['preset']}",
        *([f"features of the sound every {audio['hop_samples']} samples"] if (audio := rates.options.get("audio", {})).get("weights") else []),
        "reading, computing and writing overlap completely; no machine fails; starting Ray, listing the clips and Ray's own work are not counted",
        "the machine that writes a shard receives its clips from those that encoded them; nothing else crosses the network twice",
        f"{QUEUED_PER_WORKER} clips in flight for each worker (in_flight=0), and at most {MAX_PARTIAL_BATCHES:.0%} of the segments in part batches",
    ]
    if rates.device == "cuda":
        lines.append("re-encoding uses the processors of all machines; featurising, and all of fused=true, only machines that have GPUs")
    elif cluster.gpus:
        lines.append("the cluster's GPUs are not used: the rates are those of the tower on the CPU")
    return lines


def _described(group: NodeGroup) -> str:
    gpus = f", {group.gpus} x {group.gpu_kind}" if group.gpus else ""
    return f"{group.count} x {group.name} ({group.cpus} CPUs{gpus}, {group.network_mb_per_second:g} MB/s)"


def duration(seconds: float | int) -> str:
    """A time as a person says it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d}"


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.1f} MB"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.estimate`."""
    return job_main(PlanConfig, run, argv, command="plan")


if __name__ == "__main__":
    sys.exit(main())
