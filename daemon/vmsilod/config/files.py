"""The files of the configuration: which of them count, what is in them, and how drop-ins are merged.

Called by the loader. Knows TOML and directories, not options. Reading never follows the content: a file
is data until the models have checked it. Symlinks are the administrator's choice; a link to /dev/null
masks the vendor's file.
"""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsilod.config.problems import Problem, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

FILE_MAX = 1024 * 1024  # bytes
DEPTH_MAX = 16
_SUFFIX = ".toml"
_DROP_IN_SUFFIX = ".toml.d"

Key = tuple[str, ...]


@dataclass(frozen=True)
class FileSet:
    """One configuration file: `main` (None: only drop-ins exist) and its drop-ins, lowest priority first."""

    stem: str
    main: Path | None
    drop_ins: tuple[Path, ...]


@dataclass
class Document:
    """The merged content of a FileSet; `origins` tells for every key which file it came from."""

    file: str
    content: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def find_origin(self, key: Key) -> str:
        """The file that set `key`, or the nearest table around it."""
        for length in range(len(key), 0, -1):
            if origin := self.origins.get(key[:length]):
                return origin
        return self.file


def find_entries(directories: Sequence[Path], suffix: str) -> tuple[dict[str, Path], list[Problem]]:
    """File name -> path of what ends in `suffix`; of two with one name the later directory's counts."""
    entries: dict[str, Path] = {}
    problems = []
    for directory in directories:
        try:
            names = sorted(os.listdir(directory))  # noqa: PTH208  # names that are not UTF-8 must get through
        except FileNotFoundError:
            continue
        except OSError as exc:
            problems.append(Problem(printable(directory), "", f"cannot be read: {exc.strerror}"))
            continue
        for name in names:
            # Editors leave lock and backup files that start with a dot (".#banking.toml").
            if name.endswith(suffix) and not name.startswith("."):
                entries[name] = directory / name
    return dict(sorted(entries.items())), problems


def find_drop_ins(roots: Sequence[Path], relative: str) -> tuple[tuple[Path, ...], list[Problem]]:
    found, problems = find_entries([root / relative for root in roots], _SUFFIX)
    return tuple(path for path in found.values() if not _is_masked(path)), problems


def find_global(roots: Sequence[Path]) -> tuple[FileSet, list[Problem]]:
    present = [root / "vmsilo.toml" for root in roots if _exists(root / "vmsilo.toml")]
    drop_ins, problems = find_drop_ins(roots, "vmsilo.toml.d")
    return FileSet("vmsilo", present[-1] if present else None, drop_ins), problems


def find_vms(roots: Sequence[Path]) -> tuple[list[FileSet], list[Problem]]:
    """Every VM's files, ordered by file name; a masked one is left out."""
    directories = [root / "vms.d" for root in roots]
    mains, problems = find_entries(directories, _SUFFIX)
    folders, more = find_entries(directories, _DROP_IN_SUFFIX)
    problems += [problem for problem in more if problem not in problems]
    sets = []
    for stem in sorted(
        {n.removesuffix(_SUFFIX) for n in mains} | {n.removesuffix(_DROP_IN_SUFFIX) for n in folders}
    ):
        main = mains.get(stem + _SUFFIX)
        if main is not None and _is_masked(main):
            continue
        drop_ins, more = find_drop_ins(roots, f"vms.d/{stem}{_DROP_IN_SUFFIX}")
        problems += more
        if main is not None or drop_ins:
            sets.append(FileSet(stem, main, drop_ins))
    return sets, problems


def load_document(files: FileSet, *, missing_file: str, ownership: bool) -> Document:
    """Reads and merges; what cannot be read or parsed becomes a problem of the document."""
    document = Document(printable(files.main) if files.main else missing_file)
    paths = ([files.main] if files.main else []) + list(files.drop_ins)
    for path in paths:
        shown = printable(path)
        document.sources.append(shown)
        try:
            content = parse_file(path, ownership=ownership)
        except ValueError as exc:
            document.problems.append(Problem(shown, "", str(exc)))
            continue
        _merge(document, content, shown)
    return document


def parse_file(path: Path, *, ownership: bool) -> dict[str, Any]:
    """Content of one TOML file; ValueError states the fact (with line and column where TOML knows them)."""
    try:
        text = _read(path, ownership=ownership).decode("utf-8")
    except OSError as exc:
        raise ValueError(f"cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ValueError(f"is not UTF-8 at byte {exc.start}") from exc
    try:
        content = tomllib.loads(text)
    except RecursionError as exc:
        raise ValueError("is nested too deeply") from exc
    except ValueError as exc:
        # "Invalid value (at line 3, column 5)" -> "line 3, column 5: Invalid value"
        message, _, place = str(exc).rpartition(" (at ")
        fact = f"{place.removesuffix(')')}: {message}" if message else str(exc)
        raise ValueError(printable(fact)) from exc
    if _is_deep(content):
        raise ValueError("is nested too deeply")
    return content


def _is_deep(content: dict[str, Any]) -> bool:
    """More levels than any option has; found without recursion, as dotted keys nest without limit."""
    level: list[Any] = [content]
    for _ in range(DEPTH_MAX):
        inner: list[Any] = []
        for value in level:
            inner += value.values() if isinstance(value, dict) else value
        level = [value for value in inner if isinstance(value, (dict, list))]
    return bool(level)


def _read(path: Path, *, ownership: bool) -> bytes:
    # O_NONBLOCK: a FIFO in the directory must not hold up the daemon.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        if ownership and status.st_uid != 0:
            raise ValueError(f"belongs to uid {status.st_uid}, not to root")
        if ownership and status.st_mode & 0o022:
            raise ValueError(f"can be written by others than root (mode {stat.S_IMODE(status.st_mode):04o})")
        with os.fdopen(fd, "rb", closefd=False) as stream:
            content = stream.read(FILE_MAX + 1)
    finally:
        os.close(fd)
    if len(content) > FILE_MAX:
        raise ValueError(f"is larger than {FILE_MAX} bytes")
    return content


def _merge(document: Document, content: dict[str, Any], file: str) -> None:
    def merge(into: dict[str, Any], new: dict[str, Any], prefix: Key) -> None:
        for name, value in new.items():
            key = (*prefix, name)
            document.origins[key] = file
            if isinstance(value, dict):
                if not isinstance(into.get(name), dict):
                    into[name] = {}
                merge(into[name], value, key)
            else:
                into[name] = value

    merge(document.content, content, ())


def _exists(path: Path) -> bool:
    """True for anything in that place, a dangling link included: reading it then says what is wrong."""
    return os.path.lexists(path)


def _is_masked(path: Path) -> bool:
    return path.is_symlink() and path.resolve() == Path(os.devnull)
