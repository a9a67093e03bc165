"""The one module that reads configuration: a frozen dataclass is the schema, YAML and `key=value` arguments are the values.

Knows nothing of the jobs. A typo is an error that suggests the right name; every option's help is its field's docstring.
"""

import ast
import dataclasses
import inspect
import itertools
import os
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs import storage

T = TypeVar("T")
HERE = Path(__file__).parent
REQUIRED = "???"
"""The default of a field that has none: OmegaConf's mark for a mandatory value."""


class JobError(RuntimeError):
    """A job ended without its result for a reason that the message explains; the command exits with status 1."""


def load(schema: type[T], arguments: Sequence[str] = (), *, positional: str | None = None) -> T:
    """An instance of the frozen dataclass `schema` from command-line arguments.

    `config=FILE` (a path, also in an object store, or the name of a file in `configs/`, without `.yaml`) gives values that `key=value` arguments
    override; keys of nested sections are dotted. `positional` names the field that the first bare argument sets. Raises ValueError for an unknown
    or missing key, a value of the wrong type or a missing file.
    """
    given: list[Any] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            if positional is None:
                raise ValueError(f"argument {argument!r} is not of the form key=value; `--help` lists the keys")
            key, value, positional = positional, argument, None
        if key == "config":
            given.insert(0, OmegaConf.load(find_yaml(value)))
        else:
            # A text field takes its value as it stands: YAML would read the key 0123 as an octal number.
            given.append(
                _nest(key, value) if _is_text(schema, key) and value != "null" else OmegaConf.from_dotlist([argument if equals else f"{key}={value}"])
            )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), *given)
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ValueError(f"missing {', '.join(f'{name}=...' for name in missing)}; `--help` lists every option")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or error.key}: {str(error).splitlines()[0]}; `--help` lists every key with its type") from error
    return typing.cast(T, config)


def peek(arguments: Sequence[str], key: str) -> str | None:
    """What the arguments give for a top-level key, themselves or by a configuration file, before it is known which schema they are for; or None.

    A configuration that cannot be found gives nothing: `load` says so.
    """
    given = {name: value for name, equals, value in (argument.partition("=") for argument in arguments) if equals}
    if key in given:
        return given[key]
    if "config" not in given or not is_yaml(given["config"]):
        return None
    values = OmegaConf.to_container(OmegaConf.load(find_yaml(given["config"])))
    return str(values[key]) if isinstance(values, dict) and key in values else None


def find_yaml(name: str) -> Path:
    """The YAML file called `name`: a path, or a file of `configs/` with or without its ending. Raises ValueError with the names there are."""
    if storage.is_remote(name):
        return storage.local_copy(name)
    for candidate in _candidates(name):
        if candidate.is_file():
            return candidate
    raise ValueError(f"config={name}: no such file; give a path or one of {', '.join(sorted(p.stem for p in HERE.glob('*.yaml')))}")


def is_yaml(name: str) -> bool:
    """Whether `find_yaml` would look no further: there is such a file, or it is an address."""
    return storage.is_remote(name) or any(candidate.is_file() for candidate in _candidates(name))


def _candidates(name: str) -> tuple[Path, ...]:
    return Path(name), HERE / name, HERE / f"{name}.yaml"


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists and scalars, for YAML and JSON."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def save(config: Any, path: str | os.PathLike) -> None:
    """Write a configuration (dataclass instance) as YAML, so that the file beside a job's results repeats the job."""
    storage.write_bytes(path, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


def help_text(schema: type, *, command: str, summary: str, positional: str | None = None) -> str:
    """What `--help` prints: every option with type, default and its field's docstring."""
    usage = f"usage: soundshard {command} {f'{positional.upper()} ' if positional else ''}[config=FILE] [key=value ...]"
    lines = [usage, "", summary.strip(), "", "options:"]
    for name, annotation, default, doc in options(schema):
        lines.append(f"  {name}: {annotation} (required)" if default == REQUIRED else f"  {name}: {annotation} = {_shown(default)}")
        lines += textwrap.wrap(doc, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def options(schema: type, prefix: str = "", default: Any = None) -> Iterator[tuple[str, str, Any, str]]:
    """(dotted name, type, default, docstring) of every field, nested sections included. `default` is the section that holds the defaults."""
    docs, hints = _field_docs(schema), typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint, value = hints[field.name], getattr(default, field.name) if default is not None else _default(field)
        if dataclasses.is_dataclass(hint):
            yield from options(typing.cast(type, hint), f"{prefix}{field.name}.", value)
        else:
            text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
            yield prefix + field.name, text, value, docs.get(field.name, "")


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _shown(default: Any) -> str:
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else repr(default) if default == "" else str(default)


def job_main(schema: type[T], run: Callable[[T], Any], argv: Sequence[str] | None = None, *, command: str, positional: str | None = None) -> int:
    """The body of every job's `main`: parse, help, run, and turn what went wrong into one line and an exit status.

    0: done. 1: the job failed (JobError, StorageError). 2: the arguments or inputs are wrong (ValueError, FileNotFoundError). 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(a in ("-h", "--help", "help") for a in arguments):
        print(help_text(schema, command=command, summary=inspect.getdoc(run) or "", positional=positional))
        return 0
    try:
        config = load(schema, arguments, positional=positional)
        run(config)
    except KeyboardInterrupt:
        print(f"soundshard {command}: interrupted; what is finished is kept, run the same command again to go on", file=sys.stderr)
        return 130
    except (JobError, storage.StorageError, ValueError, FileNotFoundError, PermissionError) as error:
        if os.environ.get("SOUNDSHARD_TRACEBACK") or not (isinstance(error, JobError) or _is_ours(error)):
            traceback.print_exc()
        print(f"soundshard {command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, (JobError, storage.StorageError)) else 2
    return 0


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised by the project's own code, whose messages are written for users."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        bool(frames)
        and Path(frames[-1].filename).resolve().is_relative_to(HERE.parent.resolve())
        and "site-packages/torch" not in frames[-1].filename
    )


def _nest(key: str, value: str) -> dict[str, Any]:
    head, dot, rest = key.partition(".")
    return {head: _nest(rest, value)} if dot else {head: value}


def _is_text(schema: Any, key: str) -> bool:
    head, dot, rest = key.partition(".")
    hint = typing.get_type_hints(schema).get(head)
    if dot:
        return dataclasses.is_dataclass(hint) and _is_text(hint, rest)
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    return str in members and set(members) <= {str, types.NoneType}


def _field_docs(schema: type) -> dict[str, str]:
    """The string literal under each field, which Python itself throws away."""
    docs: dict[str, str] = {}
    for base in reversed([c for c in schema.__mro__ if dataclasses.is_dataclass(c)]):
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for field, doc in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(doc.value.value).split())
    return docs
