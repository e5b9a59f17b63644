"""Who may import whom: one table, and the rule that no cycle exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ROOTS = {"daemon": REPO / "daemon", "client": REPO / "client", "guest": REPO / "guest"}

# Package -> packages of ours that it may import. What runs as another user or in the guest knows nothing of
# vmsilod.
PACKAGES = {
    "vmsilo_wire": set[str](),
    "vmsilo_agent": {"vmsilo_wire"},
    "vmsilo": {"vmsilo_wire"},
    "vmsilo_relay": {"vmsilo_wire"},
    "vmsilo_console": {"vmsilo_wire", "vmsilo_relay"},
    "vmsilo_forward": {"vmsilo_wire", "vmsilo_relay"},
    "vmsilo_launch": set[str](),
    "vmsilo_share": {"vmsilo_launch"},
    "vmsilo_image": set[str](),
    "vmsilod": {"vmsilo_wire", "vmsilo_image"},
}

# Inside vmsilod, from the bottom up: each line may import from the lines above it, and from its own.
LAYERS = (
    {"vmsilod.errors"},
    {"vmsilod.loop", "vmsilod.closing"},
    {"vmsilod.waiting", "vmsilod.events", "vmsilod.state_file"},
    {"vmsilod.pci", "vmsilod.network.plan", "vmsilod.network.names"},
    {"vmsilod.config", "vmsilod.resources", "vmsilod.vmm", "vmsilod.systemd"},
    {"vmsilod.restart", "vmsilod.first_sign"},
    {"vmsilod.units", "vmsilod.bus", "vmsilod.host"},
    {"vmsilod.network"},
    {"vmsilod.registry", "vmsilod.order_socket"},
    {"vmsilod.consoles", "vmsilod.relay_client", "vmsilod.control", "vmsilod.preparation", "vmsilod.watch"},
    {"vmsilod.image_watch", "vmsilod.disk_plans", "vmsilod.disk_claims"},
    {
        "vmsilod.hugepages",
        "vmsilod.shapes",
        "vmsilod.memory",
        "vmsilod.interfaces",
        "vmsilod.relay_agreement",
    },
    {
        *("vmsilod.spawning", "vmsilod.ssh_login", "vmsilod.vm_view", "vmsilod.publication"),
        "vmsilod.endings",
    },
    {"vmsilod.usb", "vmsilod.hotplug", "vmsilod.disks", "vmsilod.killing"},
    {"vmsilod.holders", "vmsilod.forwards", "vmsilod.shares"},
    {"vmsilod.runs"},
    {"vmsilod.lifecycle"},
    {"vmsilod.disposables"},
    {"vmsilod.main"},
)

STDLIB_ONLY = (
    "vmsilo_wire",
    "vmsilo_agent",
    "vmsilo",
    "vmsilo_relay",
    "vmsilo_console",
    "vmsilo_forward",
    "vmsilo_launch",
    "vmsilo_share",
)
LATE = {"vmsilo": {"jeepney"}}  # imported where D-Bus is needed, not at start


def find_modules() -> dict[str, Path]:
    modules = {}
    for root in ROOTS.values():
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[0] in PACKAGES:
                modules[".".join(part for part in parts if part != "__init__")] = path
    return modules


MODULES = find_modules()


def imports_of(path: Path, *, at_run_time: bool) -> set[str]:
    """Absolute names; with at_run_time those below TYPE_CHECKING do not count."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                skipped.update(child for statement in node.body for child in ast.walk(statement))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
                for alias in node.names
            )
    return found


def layer_of(module: str) -> int | None:
    for number, layer in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in layer):
            return number
    return None


def test_every_module_of_vmsilod_has_a_layer() -> None:
    homeless = [name for name in MODULES if name.startswith("vmsilod.") and layer_of(name) is None]
    assert not homeless


@pytest.mark.parametrize("module", sorted(MODULES))
def test_packages_import_only_what_the_table_says(module: str) -> None:
    package = module.split(".")[0]
    used = {name.split(".")[0] for name in imports_of(MODULES[module], at_run_time=False)} & set(PACKAGES)
    assert used - {package} <= PACKAGES[package]


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("vmsilod.")))
def test_vmsilod_imports_downwards(module: str) -> None:
    own = layer_of(module)
    upwards = {
        name
        for name in imports_of(MODULES[module], at_run_time=False)
        if (layer := layer_of(name)) is not None and own is not None and layer > own
    }
    assert not upwards


@pytest.mark.parametrize("package", STDLIB_ONLY)
def test_small_programs_use_the_standard_library_only(package: str) -> None:
    import sys

    allowed = set(sys.stdlib_module_names) | PACKAGES[package] | {package} | LATE.get(package, set())
    for name, path in MODULES.items():
        if name.split(".")[0] == package:
            used = {imported.split(".")[0] for imported in imports_of(path, at_run_time=True)}
            assert used <= allowed, name


# vmsilo-pci-claim runs before there is anything but /usr: the modules that it imports.
EARLY = ("address", "binding", "early", "initramfs", "plan", "roots", "topology", "usage")


@pytest.mark.parametrize("name", EARLY)
def test_what_runs_early_in_a_boot_uses_the_standard_library_only(name: str) -> None:
    import sys

    allowed = {"vmsilod.errors", *(f"vmsilod.pci.{module}" for module in EARLY)}
    used = imports_of(MODULES[f"vmsilod.pci.{name}"], at_run_time=True)
    assert {module for module in used if module.split(".")[0] not in sys.stdlib_module_names} <= allowed


def test_no_cycles() -> None:
    graph = {name: imports_of(path, at_run_time=True) & set(MODULES) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        assert name not in chain, " -> ".join((*chain, name))
        if name not in done:
            for imported in sorted(graph[name] - {name}):
                visit(imported, (*chain, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_files_stay_small() -> None:
    paths = [path for root in (*ROOTS.values(), REPO / "tests") for path in root.rglob("*.py")]
    long = {str(path.relative_to(REPO)) for path in paths if len(path.read_text().splitlines()) > 400}
    assert not long
