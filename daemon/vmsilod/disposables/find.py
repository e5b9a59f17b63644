"""Of what a disposable is made, and which networks others have. Called by the keeper; it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from vmsilod.config.disposables import DisposableOptions
from vmsilod.config.model import resolve_vm
from vmsilod.config.network_checks import find_host_routes
from vmsilod.config.schema import VmFile
from vmsilod.errors import BadRequest, ConfigBroken, NoSuchVm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from vmsilod.config.model import VmConfig
    from vmsilod.config.schema import GlobalConfig
    from vmsilod.network.plan import Network
    from vmsilod.network.pool import NetworkPool

BUILT_IN = "disposable"
"""The name of the built-in template, which no file says: the default image, without a network."""


@dataclass(frozen=True)
class Templates:
    """The configured VMs of the last reading; `settings` None: the global file is broken."""

    settings: GlobalConfig | None = None
    vms: Mapping[str, VmConfig] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def options(self) -> DisposableOptions:
        return self.settings.disposables if self.settings is not None else DisposableOptions()


def find_template(templates: Templates, name: str) -> VmConfig:
    """`name` "" is the default template. Raises a VmsiloError for one that there is not."""
    if templates.settings is None:
        raise ConfigBroken("the configuration is broken", "vmsilo check")
    wanted = name or templates.options.template
    if not wanted:
        file = VmFile(name=BUILT_IN)
        return resolve_vm(templates.settings, file, ("the built-in template of disposables",))
    if wanted in templates.vms:
        return templates.vms[wanted]
    if not name:
        raise BadRequest(
            f"the template of disposables, '{wanted}', is no VM that works",
            "vmsilo check, and disposables.template in vmsilo.toml",
        )
    raise NoSuchVm(f"there is no VM '{wanted}' that works", "vmsilo list")


def find_taken(pool: NetworkPool, others: Iterable[VmConfig]) -> Iterator[Network]:
    """What VMs have, or were started with, and what the host reaches by other ways."""
    yield from pool.find_networks()
    for config in others:
        for interface in config.network.interfaces.values():
            for address in interface.host_addresses:
                yield address.network
    for network, _ in find_host_routes():
        yield network
