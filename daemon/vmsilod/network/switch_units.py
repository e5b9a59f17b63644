"""The units that hold the namespaces of VM-to-VM networks: written, started and removed.

Called by the switch on the main loop, under its lock. Only files that vmsilod generated are ever removed.
systemd is the truth about which network is held; nothing is remembered here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsilod import loop
from vmsilod.errors import Failed
from vmsilod.network.namespaces import open_namespace
from vmsilod.units.files import MARK, UNIT_DIR
from vmsilod.units.switch import SWITCH_UNITS, network_of, render_switch, switch_unit

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from vmsilod.systemd import Systemd


class SwitchUnits:
    def __init__(self, systemd: Systemd, directory: Path = UNIT_DIR) -> None:
        self._systemd = systemd
        self._directory = directory

    async def find(self) -> frozenset[str]:
        """Those with a file, and those that run although their file is gone."""
        named = await loop.in_worker(_find_files, self._directory)
        running = {
            unit for unit, active in await self._systemd.find_units(SWITCH_UNITS) if active == "active"
        }
        return frozenset(network for unit in named | running if (network := network_of(unit)) is not None)

    async def hold(self, networks: frozenset[str]) -> None:
        if await loop.in_worker(_write_files, self._directory, networks):
            await self._systemd.reload()
        for network in sorted(networks):
            unit = switch_unit(network)
            if (await self._systemd.state(unit)).active != "active":
                result = await self._systemd.start(unit)
                if result != "done":
                    raise Failed(f"{unit} did not start: {result}", f"see journalctl -u {unit}")

    async def open(self, network: str) -> int:
        unit = switch_unit(network)
        await self.hold(frozenset({network}))
        state = await self._systemd.state(unit)
        if not state.main_pid:
            raise Failed(f"{unit} has no process", f"see journalctl -u {unit}")
        return await loop.in_worker(open_namespace, state.main_pid, unit)

    async def release(self, networks: frozenset[str]) -> None:
        units = sorted(switch_unit(network) for network in networks)
        for unit in units:
            await self._systemd.stop(unit)
        if await loop.in_worker(_remove_files, self._directory, units):
            await self._systemd.reload()


def _find_files(directory: Path) -> set[str]:
    return {path.name for path in directory.glob(SWITCH_UNITS) if _is_generated(path)}


def _write_files(directory: Path, networks: Iterable[str]) -> bool:
    """Whether anything was written."""
    written = False
    try:
        for network in networks:
            path, text = directory / switch_unit(network), render_switch(network)
            if path.is_file() and path.read_text() == text:
                continue
            temporary = path.with_name(f".{path.name}.new")
            temporary.write_text(text)
            temporary.chmod(0o644)
            temporary.rename(path)
            written = True
    except OSError as error:
        raise Failed(f"cannot write units below {directory}: {error.strerror}") from error
    return written


def _remove_files(directory: Path, units: Iterable[str]) -> bool:
    removed = False
    try:
        for path in (directory / unit for unit in units):
            if _is_generated(path):
                path.unlink()
                removed = True
    except OSError as error:
        raise Failed(f"cannot remove units below {directory}: {error.strerror}") from error
    return removed


def _is_generated(path: Path) -> bool:
    try:
        return path.read_text().startswith(MARK)
    except OSError:
        return False
