"""VMs for the tests of the TAP pool, and the pool on a GLib loop."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from main_loop import run
from vmsilod import loop
from vmsilod.config.model import VmConfig
from vmsilod.config.schema import GlobalConfig
from vmsilod.network.planning import plan_network
from vmsilod.network.pool import NetworkPool
from vmsilod.network.switch import Switches

if TYPE_CHECKING:
    from pathlib import Path

    from vmsilod.network.plan import NetworkPlan


def require_workers_here() -> None:
    """A worker thread that was made in another network namespace would work there."""

    async def ask() -> str:
        return await loop.in_worker(os.readlink, "/proc/thread-self/ns/net")

    if run(ask()) != os.readlink("/proc/thread-self/ns/net"):  # noqa: PTH115 - not a path
        pytest.skip("the workers are in another network namespace: run this folder by itself")


def vm(number: int, *, name: str = "", cpus: int = 1, vmm: str = "qemu", **interface: Any) -> VmConfig:
    """VM `vmNUMBER` with one interface, routed: 10.HIGH.LOW.1/24 on the host, .2 in the guest."""
    name = name or f"vm{number}"
    high, low = divmod(number, 250)
    tap = {"host_address": f"10.{high}.{low}.1/24"} | interface.pop("tap", {})
    options = {
        "mac_address": f"02:00:00:00:{high:02x}:{low:02x}",
        "addresses": [f"10.{high}.{low}.2/24"],
        "tap": {key: value for key, value in tap.items() if value is not None},
    } | interface
    return VmConfig.model_validate(
        {
            **{"name": name, "user": "root", "memory": 512, "cpus": cpus, "color": "red", "vmm": vmm},
            **{"image": "default", "start_timeout": 60, "stop_timeout": 60},
            "network": {"interfaces": {"eth0": options}},
        }
    )


def bridged(number: int, bridge: str) -> VmConfig:
    return vm(number, addresses=[], tap={"host_address": None, "bridge": bridge})


class NoNetworks:
    """Holders of VM-to-VM networks where there is none."""

    async def find(self) -> frozenset[str]:
        return frozenset()

    async def hold(self, networks: frozenset[str]) -> None:
        assert not networks

    async def open(self, network: str) -> int:
        raise AssertionError(network)

    async def release(self, networks: frozenset[str]) -> None:
        assert not networks


def pool_at(lent_file: Path) -> NetworkPool:
    return NetworkPool(Switches(NoNetworks()), lent_file)


def settings_of(nat: str) -> GlobalConfig:
    host_networking = {"nat": {"enable": bool(nat), "interface": nat}}
    return GlobalConfig.model_validate({"user": "root", "host_networking": host_networking})


def applied(pool: NetworkPool, *vms: VmConfig, nat: str = "") -> None:
    """The pool has taken over these VMs."""
    run(pool.apply(settings_of(nat), {config.name: config for config in vms}))


def plan_of(*vms: VmConfig, nat: str = "") -> NetworkPlan:
    return plan_network(settings_of(nat), {config.name: config for config in vms})


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


def nft(*arguments: str) -> str:
    return subprocess.run(["nft", *arguments], capture_output=True, text=True, check=True).stdout


def taps_there() -> set[str]:
    return {line.split(": ")[1].split("@")[0] for line in ip("-o", "link").splitlines()} - {"lo"}
