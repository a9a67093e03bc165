"""Views: some of a dataset's clips, as a dataset of their own whose bytes stay where they are.

A view is a folder or prefix with two files. `dataset.json` is the parent's (the same kind, spec and fingerprint, so whatever takes the parent takes
the view) with a field `view` that names the parent and says how the clips were chosen. `manifest.parquet` has the chosen rows of the parent's
ledgers, with a split and label of the view's own and, where a list gave it, a column `start_seconds`; clips that a list names and the parent lacks
are failed rows like any other. `Index.open` reads a view as it does a dataset. A view of a view is a view of the same parent.

Knows ledgers. Knows no lists and not why a clip is chosen.
"""

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from configs import storage
from shards import ledger
from shards.dataset import INFO, info_bytes, read_info
from shards.read import Index


def write_view(out: str | os.PathLike, index: Index, table: pa.Table, *, selection: Sequence[str], overwrite: bool = False) -> None:
    """Writes a view with the rows of `table`: chosen from `index.table`, in any order, with other splits or labels if wanted, and with failed rows
    of clips that are not there (no shard). `selection` says in words how they were chosen; a view of a view begins with that one's words.

    ValueError where `out` is something else, or, without `overwrite`, another view.
    """
    out = storage.absolute(out)
    _check_rows(index, table)
    if storage.is_file(storage.join(out, INFO)):
        there = read_info(out)
        if there.view is None:
            raise ValueError(f"{out} is a dataset with shards of its own; write the view to another folder")
        if not overwrite:
            raise ValueError(f"{out} is a view of {there.view['parent']} already; overwrite=true replaces it, or write to another folder")
    before = index.info.view["selection"] if index.info.view is not None else []
    info = replace(index.info, view={"parent": _named(out, storage.absolute(index.root)), "selection": [*before, *selection]})
    rows = _in_place(table).replace_schema_metadata({ledger.FINGERPRINT: info.fingerprint.encode()})
    ledger.write(storage.join(out, ledger.MANIFEST), rows)
    storage.write_bytes(storage.join(out, INFO), info_bytes(info))


def _check_rows(index: Index, table: pa.Table) -> None:
    absent = [field.name for field in ledger.ROW_FIELDS if field.name not in table.column_names]
    if absent:
        raise ValueError(f"the rows of a view have no {', '.join(absent)}; expected all columns of a ledger")
    good = table.select(["key", "shard", "status"]).filter(pc.field("status") == "ok")
    strangers = set(good["shard"].unique().to_pylist()) - set(index.shards)
    if strangers:
        raise ValueError(f"rows of {', '.join(map(str, sorted(strangers, key=str)[:3]))}, which are no shards of {index.root}")
    if len(good["key"].unique()) < good.num_rows:
        raise ValueError("a key is chosen twice; keys must be unique in a dataset")
    for split in table["split"].unique().to_pylist():
        if not re.fullmatch(r"[\w-]+", split or "", re.ASCII):
            raise ValueError(f"split {split!r} cannot name files; expected letters, digits, '_' and '-'")


def _in_place(table: pa.Table) -> pa.Table:
    """The rows in the order in which they lie in the parent's shards, which is how they are read; those that lie nowhere last."""
    names = ["shard", *(f"{extension}.offset" for extension in ledger.extensions(table)[:1]), "key", "source"]
    return table.sort_by([(name, "ascending") for name in names]).combine_chunks()  # null comes last


def _named(out: str, parent: str) -> str:
    """The parent as the view names it: from beside, if they lie in one folder, so that this can be moved."""
    if out.rstrip("/") == parent.rstrip("/"):
        raise ValueError(f"{out} is the dataset itself; write the view to another folder")
    return posixpath.join("..", storage.basename(parent)) if storage.parent(out) == storage.parent(parent) else parent
