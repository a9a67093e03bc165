"""`soundshard subset`: some of a dataset's clips, by lists, classes, numbers, scores or a condition in SQL, as a view or as shards of their own.

Reads ledgers and lists, never a shard: 91,000 of 190,000 clips take about a second. Imports neither torch nor Ray.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from configs import storage
from configs.load import job_main
from pipeline.select import Answer, Names, as_answer, check_splits, classes_of, is_good, of_classes, remaining, told_by, with_missing, within
from pipeline.subset_lists import classes_in, read_lists
from pipeline.subset_report import SHOWN, Chosen, Tally, presence_of, report, summed, write_lacking
from pipeline.subset_scores import Scores, in_sync
from pipeline.where import columns_of, holds
from shards.materialise import materialise
from shards.read import START, Index
from shards.view import write_view


@dataclass(frozen=True)
class Recipe:
    """A published subset."""

    files: tuple[str, ...]
    """Its split files, which a folder must have, or"""
    whole: str
    """the one file that lists all of it."""
    published: Mapping[str, int]
    """How many clips each split has where it was published."""
    where: str
    """Where the lists come from."""


RECIPES = {
    "visualsound": Recipe(
        ("visualsound_train.txt", "visualsound_validation.txt", "visualsound_test.txt"),
        "visualsound.csv",
        {"train": 77_265, "validation": 8_357, "test": 5_425},
        "https://github.com/ilpoviertola/V-AURA has them in data/splits/visualsound",
    )
}


@dataclass(frozen=True)
class SubsetConfig:
    """Options of `soundshard subset`. All that are given must hold."""

    recipe: str = ""
    """A published subset: `visualsound`, of which lists= are the published split files. Says how much of it is there."""
    data: str = "???"
    """The dataset, or a view of one."""
    out: str = "???"
    """Where the view goes, or with `materialise` the dataset: a folder or a prefix in an object store."""
    lists: Any = ""
    """A list of clips, or several, [a,b], of which a clip must be in one: whatever `listing` of `soundshard prepare` takes, such as clip ids one a
    line, a csv or json, or a folder of split files. The split that a list says, or that its name ends with, becomes the clip's. What a list names
    and the dataset lacks is a failed row of the view, `missing`, and in its missing.csv."""
    starts: Any = ""
    """A csv with start times (`file,start_sec`, or a list of fixed offsets), or several: takes these clips, and keeps the times in the view, where
    `soundshard generate` finds them."""
    exclude: Any = ""
    """A list of clips, or several, as in `lists`: takes none of these."""
    classes: str = ""
    """Takes clips of these classes: a file with one a line, or the names themselves, `dog barking;people eating, noodle`. Of AudioSet's several
    labels one must be among them."""
    min_seconds: float | None = None
    """Shortest clip."""
    max_seconds: float | None = None
    """Longest clip."""
    where: str = ""
    """A condition in SQL on the columns of the ledger (key, split, label, source, status, reason, duration_seconds, "mp4.size", ...) and of the
    scores: `loudness_lufs > -40 AND label NOT LIKE '%music%'`. A name with a dot stands in double quotes, text in single ones."""
    scores: Any = ""
    """Files or datasets of scores: a parquet with a column `key`, a csv, ImageBind's `{"path.mp4": score}`; several as [a,b]. Empty takes those that
    `soundshard score` left with the dataset."""
    score: str = ""
    """The column of the scores that `min_score` and `max_score` bound. Empty takes it where there is only one."""
    min_score: float | None = None
    """Least score; VisualSound takes ImageBind's similarity from 0.3."""
    max_score: float | None = None
    """Largest score."""
    sync: str = ""
    """Offsets: the parquet of `soundshard sync source=`. Takes what is in sync by the next three; clips without an answer are left out."""
    max_offset_seconds: float | None = 0.2
    """Largest offset, to either side. null: any."""
    min_probability: float | None = None
    """Least probability of the offset."""
    min_synchronisable: float | None = None
    """Least probability that there is anything to synchronise; needs `soundshard sync synchronisable=true`."""
    materialise: bool = False
    """Write shards, whose members are copied without decoding, instead of a view: the bytes that preparing only these clips would have written."""
    clips_per_shard: int | None = None
    """Of what is materialised: clips in a shard; by default as many as in the dataset's."""
    workers: int = 4
    """Shards that are copied at a time."""
    overwrite: bool = False
    """Replace the view that is at `out`."""


def run(config: SubsetConfig) -> Chosen:
    """Choose clips of a dataset by lists, classes, length, scores, offsets or a condition, and write them as a view or as shards of their own.

    What cannot be told of a good clip, such as a score that it has not, does not hold. A failed clip stays as a failed row unless it is certain that
    something does not hold.
    """
    _check(config)
    index = Index.open(storage.absolute(config.data))
    chosen = choose(index, config)  # ledger rows and lists alone
    published = {name: recipe.published for name, recipe in RECIPES.items()}
    print("\n".join(report(chosen, published)), flush=True)
    if not chosen.steps[-1].total:
        emptied = next(step.name for step in chosen.steps if not step.total)
        raise ValueError(f"no clip of {config.data} is left after {emptied}; nothing is written")
    if config.materialise:
        _copy(config, index, chosen)
    else:
        write_view(config.out, index, chosen.table, selection=selection(config), overwrite=config.overwrite)
        print(f"subset: {summed(chosen.steps[-1])} -> {config.out}, a view of {index.root}", flush=True)
    write_lacking(config.out, chosen.presences)
    return chosen


def choose(index: Index, config: SubsetConfig) -> Chosen:
    """The rows of a dataset that meet every criterion of the options. Writes nothing."""
    table, presences, notes = index.table, [], []
    splits = table["split"].unique().to_pylist()
    split = splits[0] if len(splits) == 1 else "train"
    listings = [
        listing for listing in (read_lists("lists", list_files(config), name=config.recipe), read_lists("starts", several(config.starts))) if listing
    ]
    for listing in listings:
        check_splits(listing)
        table = with_missing(table, listing, split=split, of=config.data)
    names, good, tally = Names(table["key"]), is_good(table), Tally(table)
    kept = np.ones(table.num_rows, bool)
    steps = [tally.step(f"all of {config.data}", table["split"], np.arange(table.num_rows) < index.table.num_rows)]

    def keep(name: str, answer: Answer) -> None:
        nonlocal kept
        kept = kept & remaining(answer, good)
        steps.append(tally.step(name, table["split"], kept))

    for listing in listings:
        found = names.find(listing.keys)
        places = names.places(found)
        table = told_by(table, listing, places)
        presences.append(presence_of(listing, table, names, found))
        keep(listing.name, as_answer(places >= 0))
    if excluded := read_lists("exclude", several(config.exclude)):
        keep(excluded.name, as_answer(names.places(names.find(excluded.keys)) < 0))
    if config.classes:
        classes = classes_in(config.classes)
        notes += _unknown_classes(classes, table)
        keep(f"classes={config.classes}", of_classes(table["label"], classes))
    if config.min_seconds is not None or config.max_seconds is not None:
        keep(_bounds("seconds", config.min_seconds, config.max_seconds), within(table["duration_seconds"], config.min_seconds, config.max_seconds))
    scores = Scores(index, several(config.scores), names)
    if config.where:
        keep(f"where {config.where}", _where(config.where, table, scores))
    if config.min_score is not None or config.max_score is not None:
        column = config.score or scores.only()
        keep(_bounds(column, config.min_score, config.max_score), within(scores.numbers(column), config.min_score, config.max_score))
    if config.sync:
        keep(
            _sync_words(config),
            in_sync(
                config.sync,
                names,
                max_offset_seconds=config.max_offset_seconds,
                min_probability=config.min_probability,
                min_synchronisable=config.min_synchronisable,
            ),
        )
    if config.materialise and START in table.column_names:
        notes.append("start times stay in views: shards do not have them")
    return Chosen(table.filter(pa.array(kept)), steps, presences, notes)


def _check(config: SubsetConfig) -> None:
    """Refuses options that say nothing without another."""
    if config.recipe and config.recipe not in RECIPES:
        raise ValueError(f"there is no recipe {config.recipe!r}; there is {', '.join(RECIPES)}")
    if config.recipe and not config.lists:
        recipe = RECIPES[config.recipe]
        raise ValueError(f"give lists=FOLDER with {', '.join(recipe.files)}, or lists={recipe.whole}: {recipe.where}")
    if config.score and config.min_score is None and config.max_score is None:
        raise ValueError(f"score={config.score} needs min_score= or max_score=")
    if not config.sync and not (config.min_probability is None and config.min_synchronisable is None):
        raise ValueError("min_probability and min_synchronisable need sync=FILE, the parquet of `soundshard sync source=`")
    if several(config.scores) and not config.where and config.min_score is None and config.max_score is None:
        raise ValueError("scores= needs min_score= or max_score=, or a where= that names a score")
    if config.materialise and config.overwrite:
        raise ValueError("overwrite=true replaces a view; shards are not replaced: give another out, or remove the folder first")
    if config.clips_per_shard is not None and not config.materialise:
        raise ValueError("clips_per_shard is of shards; a view has none: give materialise=true")
    if not selection(config):
        raise ValueError("nothing says which clips to take: give lists, starts, exclude, classes, min_seconds, max_seconds, where, min_score or sync")


def several(value: Any) -> list[str]:
    """An option that takes one path or several."""
    return [str(path) for path in (value if isinstance(value, list) else [value]) if path not in ("", None)]


def selection(config: SubsetConfig) -> list[str]:
    """What decides the choice, as a user would give it."""
    words: list[str] = [config.recipe] if config.recipe else []
    for name in ("lists", "starts", "exclude"):
        if paths := several(getattr(config, name)):
            words.append(f"{name}={paths[0] if len(paths) == 1 else '[' + ','.join(paths) + ']'}")
    given = {name: getattr(config, name) for name in ("classes", "min_seconds", "max_seconds", "where", "score", "min_score", "max_score", "sync")}
    words += [f"{name}={value}" for name, value in given.items() if value not in ("", None)]
    if config.sync:
        words.append(_sync_words(config).partition(": ")[2])
    return words


def list_files(config: SubsetConfig) -> list[str]:
    """The list files of `lists`; a recipe knows which of a folder's are its own."""
    paths = several(config.lists)
    if not config.recipe:
        return paths
    recipe, found = RECIPES[config.recipe], []
    for path in paths:
        if not storage.is_folder(path):
            found.append(path)
            continue
        there = set(storage.names(path))
        absent = [name for name in recipe.files if name not in there]
        if absent and recipe.whole not in there:
            raise ValueError(f"{path} has no {', '.join(absent)}, and no {recipe.whole}; {recipe.where}")
        found += [storage.join(path, name) for name in ([recipe.whole] if absent else recipe.files)]
    return found


def _unknown_classes(classes: Sequence[str], table: pa.Table) -> list[str]:
    """A note on the classes that no clip is of, with what they may mean."""
    there = sorted({name for label in table["label"].unique().drop_null().to_pylist() for name in classes_of(label)})
    known = set(there)
    unknown = [name for name in classes if name not in known]
    near = {name: get_close_matches(name, there, n=1) for name in unknown[:SHOWN]}
    told = [f"{name!r}" + (f" (did you mean {near[name][0]!r}?)" if near[name] else "") for name in near]
    more = ", ..." if len(unknown) > SHOWN else ""
    return [f"of {len(classes)} classes no clip is of {len(unknown)}: {', '.join(told)}{more}"] if unknown else []


def _where(where: str, table: pa.Table, scores: Scores) -> Answer:
    kinds = scores.schema | {field.name: field.type for field in table.schema}
    needed = columns_of(where, kinds) or ["status"]
    return holds(where, {name: table[name] if name in table.column_names else scores.column(name) for name in needed})


def _sync_words(config: SubsetConfig) -> str:
    bounds = {name: getattr(config, name) for name in ("max_offset_seconds", "min_probability", "min_synchronisable")}
    return f"sync={config.sync}: " + " ".join(f"{name}={value:g}" for name, value in bounds.items() if value is not None)


def _bounds(name: str, least: float | None, most: float | None) -> str:
    return " ".join([*([f"{least:g} <="] if least is not None else []), name, *([f"<= {most:g}"] if most is not None else [])])


def _copy(config: SubsetConfig, index: Index, chosen: Chosen) -> None:
    """Writes the choice as shards. The view that says what they are of is needed no longer than that."""
    every = 0.5 if sys.stderr.isatty() else 30.0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=chosen.table.num_rows, desc="subset", unit="clip", mininterval=every) as bar:

        def copied(done: int, _: int) -> None:
            bar.update(done - bar.n)

        view = os.path.join(folder, "view")
        write_view(view, index, chosen.table, selection=selection(config))
        totals = materialise(view, config.out, clips_per_shard=config.clips_per_shard, workers=config.workers, progress=copied)
    print(f"subset: {summed(chosen.steps[-1])} in {totals.shards:,} shards -> {config.out}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.subset`."""
    return job_main(SubsetConfig, run, argv, command="subset", positional="recipe")


if __name__ == "__main__":
    sys.exit(main())
