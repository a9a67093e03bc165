"""The codec that a run's codes were made with, where its weights are on this machine: for the embeddings' start, and to hear what is generated.

Knows run folders and `model.codecs`. Training itself needs no codec.
"""

from pathlib import Path
from typing import Literal

from configs import storage
from model.codecs import Codec, load_codec
from model.run_folder import RunConfig
from model.vaura import Vaura
from model.weights import sha256_file

Embeddings = Literal["auto", "codec", "random"]


def find_codec(folder: Path, described: RunConfig) -> tuple[Path | None, str]:
    """The codec's weights file: where the dataset or the run folder has it, or in the cache of fetched weights. None, and why, if it is not here."""
    reference = described.weights.get("codec", {})
    recorded = described.weights_path(folder, "codec")
    expected = reference.get("sha256") or described.data["spec"]["codec"].get("weights_sha256")
    if recorded is None or not expected:
        return None, "the dataset does not say which file it was made with"
    candidates = [recorded, folder / "weights" / f"codec{recorded.suffix}", storage.cache_dir() / recorded.name]
    there = [path for path in candidates if path.is_file()]
    fitting = next((path for path in there if sha256_file(path) == expected), None)
    if fitting is None:
        return None, f"{there[0]} is another file than the dataset was made with" if there else f"{recorded} is not here"
    return fitting, ""


def open_codec(path: Path, described: RunConfig) -> Codec:
    """The codec as the dataset's codes were made with it, on the CPU."""
    return load_codec(path, bandwidth_kbps=described.data["spec"]["codec"].get("bandwidth_kbps", 6.0))


def start_embeddings(model: Vaura, choice: Embeddings, folder: Path, described: RunConfig) -> str:
    """Begin the embeddings as the option says. Returns what was done, in words; ValueError where the codec is asked for and is not here."""
    path, why = (None, "as asked for") if choice == "random" else find_codec(folder, described)
    if path is not None:
        books = open_codec(path, described).codebook_tables()
        model.start_from_codec(books.tables, books.biases)
        return f"embeddings from the codebooks of {path}"
    if choice == "codec":
        raise ValueError(
            f"embeddings=codec: the codec's weights are needed, and {why}; put the file there (`soundshard weights` fetches published ones), or give "
            "embeddings=random"
        )
    return f"embeddings at random: {why}" if choice == "auto" else "embeddings at random"
