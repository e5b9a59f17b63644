"""Plans for the tests of the TAP pool, and the pool on a GLib loop."""

from __future__ import annotations

import os
import subprocess
from ipaddress import ip_interface
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

pytest.importorskip("gi", reason="needs python3-gi")

from gi.repository import GLib
from vmsilod import loop
from vmsilod.network.plan import NetworkPlan, Port

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


def run(coro: Coroutine[Any, Any, T]) -> T:
    main_loop = GLib.MainLoop()
    future = loop.spawn(coro)
    future.add_done_callback(lambda _: loop.call_soon(main_loop.quit))
    main_loop.run()
    return future.result(0)


def require_workers_here() -> None:
    """A worker thread that was made in another network namespace would work there."""

    async def ask() -> str:
        return await loop.in_worker(os.readlink, "/proc/thread-self/ns/net")

    if run(ask()) != os.readlink("/proc/thread-self/ns/net"):  # noqa: PTH115 - not a path
        pytest.skip("the workers are in another network namespace: run this folder by itself")


def port(number: int, vm: str = "", **options: Any) -> Port:
    """Of VM `vmNUMBER`, routed: 10.N.N.1/24 on the host, .2 in the guest."""
    vm = vm or f"vm{number}"
    high, low = divmod(number, 250)
    options.setdefault("host_addresses", (ip_interface(f"10.{high}.{low}.1/24"),))
    options.setdefault("addresses", (ip_interface(f"10.{high}.{low}.2/24"),))
    return Port(
        vm=vm,
        interface=options.pop("interface", "eth0"),
        tap=options.pop("tap", f"{vm}-0"),
        mac=options.pop("mac", f"02:00:00:00:{high:02x}:{low:02x}"),
        **options,
    )


def plan(*ports: Port, nat: str = "") -> NetworkPlan:
    return NetworkPlan(tuple(ports), nat)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


def nft(*arguments: str) -> str:
    return subprocess.run(["nft", *arguments], capture_output=True, text=True, check=True).stdout


def taps_there() -> set[str]:
    return {line.split(": ")[1].split("@")[0] for line in ip("-o", "link").splitlines()} - {"lo"}
