"""Loads the whole configuration from its directories; collects every problem and raises for none.

Called by vmsilod and `vmsilo check`. A broken file disables the VM that it describes, and those which
depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from vmsilod.config import checks as checking
from vmsilod.config import image_options, network_checks
from vmsilod.config.files import Document, FileSet, find_global, find_vms, load_document
from vmsilod.config.model import VmConfig, resolve_vm
from vmsilod.config.problems import Problem, describe_error, printable
from vmsilod.config.schema import GlobalConfig, VmFile, check_vm_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_ROOTS = (Path("/usr/share/vmsilo"), Path("/etc/vmsilo"))
_OWNED_BY_ROOT = (Path("/usr"), Path("/etc"))
_ModelT = TypeVar("_ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Checks:
    """Which questions are asked of the machine.

    ownership: files must belong to root and be writable by it alone; None: only if all roots are below /usr
    and /etc.
    """

    files: bool = True
    accounts: bool = True
    ownership: bool | None = None


@dataclass(frozen=True)
class Configuration:
    """`vms` are usable; `broken` has every other VM with a valid name, and why.

    Those reasons are in `problems` too, except that a broken global file (settings is None) is listed there
    once and not once per VM.
    """

    settings: GlobalConfig | None
    vms: Mapping[str, VmConfig]
    problems: tuple[Problem, ...]
    broken: Mapping[str, tuple[Problem, ...]]
    warnings: tuple[Problem, ...] = ()
    """What will work only in part; nothing is disabled for it."""
    awaited: frozenset[str] = frozenset()
    """Network devices without which a VM is broken."""


@dataclass
class _Found:
    """What one load has gathered so far."""

    vms: dict[str, tuple[VmFile, Document]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    awaited: set[str] = field(default_factory=set)

    def broken_names(self) -> frozenset[str]:
        return frozenset(problem.vm for problem in self.problems if problem.vm)


def load_configuration(roots: Sequence[Path] = DEFAULT_ROOTS, checks: Checks | None = None) -> Configuration:
    """`roots` are directories with vmsilo.toml and vms.d/, lowest priority first."""
    checks = checks or Checks()
    ownership = checks.ownership
    if ownership is None:
        ownership = all(any(root.is_relative_to(top) for top in _OWNED_BY_ROOT) for root in roots)
    settings, settings_file, problems = _load_global(roots, checks, ownership=ownership)
    found = _Found(problems=problems)
    sets, more = find_vms(roots)
    found.problems += more
    _load_vms(found, sets, checks, ownership=ownership)
    for vm, document in found.vms.values():
        vmm = vm.vmm or (settings.vmm if settings else "auto")
        found.problems += checking.check_vmm(vm, vmm, document.find_origin)
        found.problems += checking.check_root(vm, document.find_origin)
        found.problems += image_options.check_image(vm, vmm, document.find_origin)
        found.problems += checking.check_disposable(vm, document.find_origin)
    _check_network(found, settings, settings_file, checks)
    _check_dependencies(found)
    if settings is not None:
        working = found.vms.keys() - found.broken_names()
        place = settings_file.find_origin(("disposables", "template"))
        found.warnings += checking.find_missing_template(settings, place, working)
    return _conclude(settings, found)


def _load_global(
    roots: Sequence[Path], checks: Checks, *, ownership: bool
) -> tuple[GlobalConfig | None, Document, list[Problem]]:
    files, problems = find_global(roots)
    missing = printable(roots[-1] / "vmsilo.toml") if roots else "vmsilo.toml"
    document = load_document(files, missing_file=missing, ownership=ownership)
    problems += document.problems
    if files.main is None and not files.drop_ins:
        problems.append(
            Problem(missing, "", "does not exist", 'it must say at least user = "YOUR LOGIN NAME"')
        )
        return None, document, problems
    if document.problems:
        return None, document, problems
    settings, faults = _validate(GlobalConfig, document, None)
    problems += faults
    if settings is not None and checks.accounts:
        problems += checking.check_account(settings, document.find_origin(("user",)))
    return (None if problems else settings), document, problems


def _load_vms(found: _Found, sets: Sequence[FileSet], checks: Checks, *, ownership: bool) -> None:
    files_of: dict[str, list[str]] = {}
    for files in sets:
        document = load_document(
            files, missing_file=f"vms.d/{printable(files.stem)}.toml", ownership=ownership
        )
        name = _find_name(files, document)
        if name is not None:
            files_of.setdefault(name, []).append(document.file)
        vm = _load_vm(found, files, document, name)
        if vm is None:
            continue
        if checks.files:
            found.problems += checking.check_files(vm, document.find_origin)
        found.vms.setdefault(vm.name, (vm, document))
    for name, places in files_of.items():
        if len(places) > 1:
            others = {file: [p for p in places if p != file] for file in places}
            found.problems += [
                Problem(
                    file, "name", f"the VM {name} is also described by {', '.join(others[file])}", vm=name
                )
                for file in places
            ]


def _load_vm(found: _Found, files: FileSet, document: Document, name: str | None) -> VmFile | None:
    found.problems += [replace(problem, vm=name) for problem in document.problems]
    if files.main is None:
        fact = f"drop-ins for a VM without a file {document.file}"
        found.problems.append(Problem(printable(files.drop_ins[0].parent), "", fact, vm=name))
        return None
    if not files.stem.isprintable():
        fact = "the file's name is not printable UTF-8 text"
        found.problems.append(Problem(document.file, "", fact, vm=name))
    if document.problems:
        return None
    document.content.setdefault("name", printable(files.stem))
    vm, problems = _validate(VmFile, document, name)
    found.problems += problems
    return vm


def _find_name(files: FileSet, document: Document) -> str | None:
    """The VM that these files describe, known even if they are broken; None if its name is no name."""
    name = document.content.get("name", files.stem)
    try:
        return check_vm_name(name) if isinstance(name, str) else None
    except ValueError:
        return None


def _validate(
    model: type[_ModelT], document: Document, vm: str | None
) -> tuple[_ModelT | None, list[Problem]]:
    try:
        return model.model_validate(document.content), []
    except ValidationError as exc:
        problems = []
        for error in exc.errors(include_url=False):
            fact, hint = describe_error(error, _find_known_keys(model, error["loc"]))
            place = error["loc"][:-1] if error["type"] == "extra_forbidden" else error["loc"]
            key = ".".join(printable(part) for part in place if part != "[key]")
            file = document.find_origin(tuple(str(part) for part in error["loc"]))
            problems.append(Problem(file, key, fact, hint, vm))
        return None, problems


def _find_known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the table that holds `location`; none where that is a table of names of the file's own."""
    annotation: Any = model
    for part in location[:-1]:
        table = _find_table(annotation)
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]  # the part is one of the file's names
        elif not isinstance(part, int):  # else a place in a list of tables
            information = table.model_fields.get(str(part)) if table else None
            annotation = information.annotation if information else None
    table = None if get_origin(annotation) is dict else _find_table(annotation)
    return list(table.model_fields) if table else []


def _find_table(annotation: Any) -> type[BaseModel] | None:
    """The table in `X | None`, `tuple[X, ...]`, `Annotated[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((table for inner in get_args(annotation) if (table := _find_table(inner))), None)


def _check_network(found: _Found, settings: GlobalConfig | None, document: Document, checks: Checks) -> None:
    files = {
        name: network_checks.NetworkFile(name, vm.network, own.find_origin)
        for name, (vm, own) in found.vms.items()
    }
    nat_file = document.find_origin(("host_networking", "nat", "interface"))
    found.problems += network_checks.check_conflicts(files)
    found.problems += network_checks.check_device_names(files, settings, nat_file)
    for file in files.values():
        found.warnings += network_checks.find_stray_gateways(file)
        if checks.files:
            # First: one that comes in between is looked for in vain, not missed.
            found.awaited |= network_checks.find_absent(file)
            found.problems += network_checks.check_devices(file)
    if settings is not None and checks.files:
        found.warnings += network_checks.find_missing_nat(settings, nat_file)
        found.warnings += network_checks.find_host_overlaps(files)


def _check_dependencies(found: _Found) -> None:
    depends_on = {name: vm.depends_on for name, (vm, _) in found.vms.items()}
    files = {name: document.find_origin(("depends_on",)) for name, (_, document) in found.vms.items()}
    found.problems += checking.check_cycles(depends_on, files)
    found.problems += checking.find_dangling(depends_on, files, found.broken_names())


def _conclude(settings: GlobalConfig | None, found: _Found) -> Configuration:
    broken: dict[str, tuple[Problem, ...]] = {}
    for name in sorted(found.broken_names()):
        broken[name] = tuple(problem for problem in found.problems if problem.vm == name)
    vms = {}
    for name, (vm, document) in sorted(found.vms.items()):
        if name in broken:
            continue
        if settings is None:
            reason = next((str(problem) for problem in found.problems if problem.vm is None), "")
            broken[name] = (
                Problem(document.file, "", f"the global configuration is broken: {reason}", vm=name),
            )
            continue
        vms[name] = resolve_vm(settings, vm, document.sources)
    warnings = found.warnings + checking.find_shared_devices(
        {name: vm.pci_devices for name, vm in vms.items()},
        {name: found.vms[name][1].find_origin(("pci_devices",)) for name in vms},
    )
    warnings += checking.find_equal_usb_rules(
        {name: vm.usb_devices for name, vm in vms.items()},
        {name: found.vms[name][1].find_origin(("usb_devices",)) for name in vms},
    )
    return Configuration(
        settings,
        MappingProxyType(vms),
        tuple(found.problems),
        MappingProxyType(broken),
        tuple(warnings),
        frozenset(found.awaited),
    )
