"""Who may do what, decided by the real polkitd from our policy and rule, under our bus policy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from bus.client import MANAGER, OBJECTS, PROPERTIES, ROOT, VM, BusError, Client, as_user
from bus.conftest import OWNER, STRANGER, polkit_bus, served

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DENIED = "org.vmsilo1.Error.Denied"
BANKING = f"{ROOT}/vm/banking"

# Everything that the owner may do, in an order in which it works.
OPEN_TO_OWNER: list[tuple[Any, ...]] = [
    (ROOT, MANAGER, "List"),
    (ROOT, MANAGER, "Check"),
    (ROOT, OBJECTS, "GetManagedObjects"),
    (ROOT, PROPERTIES, "Get", "ss", MANAGER, "Version"),
    (ROOT, PROPERTIES, "GetAll", "s", MANAGER),
    (ROOT, MANAGER, "Start", "sa{sv}", "banking", {"wait": ("b", False)}),
    (ROOT, MANAGER, "Restart", "sa{sv}", "banking", {}),
    (ROOT, MANAGER, "Run", "sasa{sv}", "banking", ["true"], {}),
    (ROOT, MANAGER, "Run", "sasa{sv}", "banking", ["true"], {"root": ("b", True)}),
    (ROOT, MANAGER, "OpenSsh", "sa{sv}", "banking", {}),
    (ROOT, MANAGER, "OpenSsh", "sa{sv}", "banking", {"root": ("b", True)}),
    (ROOT, MANAGER, "Stop", "sa{sv}", "banking", {"timeout": ("u", 5)}),
    (ROOT, MANAGER, "Kill", "s", "banking"),
    (ROOT, MANAGER, "ListUsb"),
    (ROOT, MANAGER, "AttachUsb", "ss", "banking", "1-2"),
    (ROOT, MANAGER, "DetachUsb", "ss", "banking", "1-2"),
    (ROOT, MANAGER, "ReleaseUsb", "s", "1-2"),
    (ROOT, MANAGER, "AttachInterface", "ss", "banking", "lan"),
    (ROOT, MANAGER, "DetachInterface", "ss", "banking", "lan"),
    (ROOT, MANAGER, "ListDisks", "s", ""),
    (ROOT, MANAGER, "ListDisks", "s", "banking"),
    (ROOT, MANAGER, "GrowDisk", "sst", "banking", "data", 1 << 34),
    (ROOT, MANAGER, "RemoveDisk", "ss", "banking", "persist"),
    (BANKING, VM, "AttachInterface", "s", "lan"),
    (BANKING, VM, "DetachInterface", "s", "lan"),
    (BANKING, PROPERTIES, "Get", "ss", VM, "State"),
    (BANKING, PROPERTIES, "GetAll", "s", VM),
    (BANKING, VM, "Start", "a{sv}", {}),
    (BANKING, VM, "Restart", "a{sv}", {}),
    (BANKING, VM, "Run", "asa{sv}", ["true"], {}),
    (BANKING, VM, "OpenSsh", "a{sv}", {}),
    (BANKING, VM, "Stop", "a{sv}", {}),
    (BANKING, VM, "Kill"),
]


@pytest.fixture(scope="module")
def address(real_polkit: str) -> Iterator[str]:
    with served(real_polkit):
        yield real_polkit


def test_the_owner_may_do_all_that_is_his(address: str) -> None:
    def errors() -> list[str]:
        client = Client(address)
        return [client.error(*call) for call in OPEN_TO_OWNER]

    assert as_user(OWNER, errors) == [""] * len(OPEN_TO_OWNER)


@pytest.mark.parametrize("interactive", [False, True])
def test_another_user_may_do_nothing(address: str, *, interactive: bool) -> None:
    def errors() -> list[str]:
        client = Client(address)
        return [client.error(*call, interactive=interactive) for call in OPEN_TO_OWNER]

    assert as_user(STRANGER, errors) == [DENIED] * len(OPEN_TO_OWNER)


@pytest.mark.parametrize("uid", [OWNER, STRANGER])
def test_debug_and_reload_need_an_administrator(address: str, uid: int) -> None:
    def errors() -> list[str]:
        client = Client(address)
        with open(os.devnull, "rb") as null:  # noqa: PTH123 - jeepney takes a file
            debug = client.error(ROOT, MANAGER, "StartDebug", "shhh", "banking", null, null, null)
        return [debug, client.error(ROOT, MANAGER, "Reload")]

    assert as_user(uid, errors) == [DENIED, DENIED]


def test_a_denial_comes_before_any_word_about_the_vm(address: str) -> None:
    def texts() -> list[str]:
        client = Client(address)
        texts = []
        for name in ("banking", "no-such-vm"):
            try:
                client.manager("Start", "sa{sv}", name, {})
            except BusError as error:
                texts.append(error.args[1])
        return texts

    assert len(set(as_user(STRANGER, texts))) == 1


def test_a_stranger_does_not_see_names_by_introspection(address: str) -> None:
    def introspect(path: str) -> str:
        client = Client(address)
        return str(client.call(path, "org.freedesktop.DBus.Introspectable", "Introspect"))

    assert "StartDebug" in as_user(STRANGER, lambda: introspect(ROOT))
    with pytest.raises(BusError, match="AccessDenied"):
        as_user(STRANGER, lambda: introspect(f"{ROOT}/vm"))
    assert "my_2dwork" in introspect(f"{ROOT}/vm")


def test_only_root_can_own_the_name(real_polkit: str) -> None:
    from jeepney.bus_messages import message_bus
    from jeepney.io.blocking import open_dbus_connection

    def request() -> str:
        with open_dbus_connection(real_polkit) as con:
            reply = con.send_and_get_reply(message_bus.RequestName("org.vmsilo1"))
        return str(reply.body[0])

    assert "not allowed to own" in as_user(OWNER, request)


def test_ssh_as_root_needs_the_other_action(open_directory: Path) -> None:
    """With a rule that gives a stranger org.vmsilo1.run alone."""
    directory = open_directory / "run-only"
    directory.mkdir()
    rules = directory / "50-run.rules"
    rules.write_text(
        'polkit.addRule(function (action, subject) { if (action.id === "org.vmsilo1.run") '
        "return polkit.Result.YES; });"
    )

    def errors() -> list[str]:
        client = Client(bus)
        call: tuple[Any, ...] = (ROOT, MANAGER, "OpenSsh", "sa{sv}", "banking")
        return [client.error(*call, {}), client.error(*call, {"root": ("b", True)})]

    with polkit_bus(directory, rules) as bus, served(bus):
        assert as_user(STRANGER, errors) == ["", DENIED]
