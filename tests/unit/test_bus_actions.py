"""The interface, the table of actions, the policy and the bus policy say the same."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from vmsilod.bus.actions import (
    ACTIONS,
    MANAGER_INTERFACE,
    PROPERTIES_INTERFACE,
    VM_INTERFACE,
    Message,
    classify,
)
from vmsilod.errors import BadRequest, Denied

TREE = Path(__file__).parent.parent.parent
INTERFACE = ET.parse(TREE / "daemon/vmsilod/bus/org.vmsilo1.xml").getroot()
POLICY = ET.parse(TREE / "polkit/org.vmsilo1.policy").getroot()

DEVICE = "0000:01:00.0"
SAMPLES = {"s": "banking", "a{sv}": {}, "u": 2048, "t": 1 << 34, "as": ["ls"], "h": 0}


def declared_calls() -> list[Message]:
    return [
        Message(
            interface.attrib["name"],
            method.attrib["name"],
            "work" if interface.attrib["name"] == VM_INTERFACE else None,
            tuple(
                DEVICE if arg.attrib["name"] == "address" else SAMPLES[arg.attrib["type"]]
                for arg in method
                if arg.attrib.get("direction") == "in"
            ),
        )
        for interface in INTERFACE.iter("interface")
        for method in interface.iter("method")
    ]


@pytest.mark.parametrize(
    "message", declared_calls(), ids=lambda message: f"{message.interface}.{message.method}"
)
def test_every_declared_method_needs_an_action(message: Message) -> None:
    need = classify(message)
    assert need.actions
    assert set(need.actions) <= set(ACTIONS)
    if message.vm is not None:
        assert need.details["vm"] == "work"
    elif message.method == "ReleaseUsb":
        assert need.details == {"device": "banking"}  # a device that no VM has
    elif message.arguments == (DEVICE,):
        assert need.details == {"device": DEVICE}
    elif message.arguments:
        assert need.details["vm"] == "banking"


@pytest.mark.parametrize(
    ("interface", "method"), [(MANAGER_INTERFACE, "Explode"), (PROPERTIES_INTERFACE, "Set"), ("x.y", "List")]
)
def test_what_is_not_in_the_table_is_denied(interface: str, method: str) -> None:
    with pytest.raises(Denied):
        classify(Message(interface, method, None, ("banking", {}, "")))


def test_a_device_is_named_in_full_to_whoever_is_asked() -> None:
    need = classify(Message(MANAGER_INTERFACE, "ClaimPci", None, ("01:00.0",)))
    assert need.actions == ("org.vmsilo1.manage-devices",)
    assert need.details == {"device": DEVICE}
    with pytest.raises(BadRequest):
        classify(Message(MANAGER_INTERFACE, "ClaimPci", None, ("01:00.0\n../x",)))


def test_root_in_a_guest_is_an_action_of_its_own() -> None:
    plain = classify(Message(VM_INTERFACE, "Run", "work", (["id"], {})))
    root = classify(Message(VM_INTERFACE, "Run", "work", (["id"], {"root": True})))
    assert plain.actions == ("org.vmsilo1.run",)
    assert root.actions == ("org.vmsilo1.run-as-root",)
    assert root.details == {"vm": "work", "command": "id"}
    with pytest.raises(BadRequest):
        classify(Message(VM_INTERFACE, "Run", "work", (["id"], {"root": 1})))


def test_ssh_needs_what_a_command_of_the_same_login_needs() -> None:
    plain = classify(Message(MANAGER_INTERFACE, "OpenSsh", None, ("work", {})))
    root = classify(Message(VM_INTERFACE, "OpenSsh", "work", ({"root": True},)))
    assert plain.actions == ("org.vmsilo1.run",)
    assert root.actions == ("org.vmsilo1.run-as-root",)
    assert plain.details == root.details == {"vm": "work", "command": "(any, by ssh)"}
    with pytest.raises(BadRequest):
        classify(Message(VM_INTERFACE, "OpenSsh", "work", ({"root": "yes"},)))


@pytest.mark.parametrize("method", ["AttachInterface", "DetachInterface"])
def test_whoever_is_asked_hears_of_which_vm_and_interface(method: str) -> None:
    need = classify(Message(MANAGER_INTERFACE, method, None, ("work", "lan")))
    assert need == classify(Message(VM_INTERFACE, method, "work", ("lan",)))
    assert need.actions == ("org.vmsilo1.manage-devices",)
    assert need.details == {"vm": "work", "device": "lan"}


def test_properties_cannot_be_written() -> None:
    assert {prop.attrib["access"] for prop in INTERFACE.iter("property")} == {"read"}


def test_the_policy_has_these_actions_and_keeps_no_password() -> None:
    assert {action.attrib["id"] for action in POLICY.iter("action")} == set(ACTIONS)
    for action in POLICY.iter("action"):
        assert {element.text for element in action.find("defaults") or ()} == {"auth_admin"}
