"""What a running VM has after an interface of its file was added to what it was started with."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("gi", reason="needs python3-gi")

from vmsilod.config.model import VmConfig
from vmsilod.errors import BadRequest, Busy
from vmsilod.hotplug import add_interface, remove_interface
from vmsilod.network.planning import plan_network


def config(**interfaces: dict[str, Any]) -> VmConfig:
    """Each interface by name, in the order of the file."""
    return VmConfig.model_validate(
        {
            **{"name": "work", "user": "root", "memory": 512, "cpus": 1, "color": "red", "vmm": "qemu"},
            **{"image": "default", "start_timeout": 60, "stop_timeout": 60},
            "network": {"interfaces": interfaces},
        }
    )


def taps_of(vm: VmConfig) -> dict[str, str]:
    return {port.interface: port.tap for port in plan_network(None, {"work": vm}).ports}


def test_an_interface_behind_the_others_makes_it_what_the_file_says() -> None:
    file = config(wan={}, lan={"addresses": ["10.0.0.2/24"]})
    after = add_interface(config(wan={}), file, "lan")
    assert after == file
    assert after.digest() == file.digest()  # no restart is needed


def test_what_else_the_file_changed_waits_for_a_restart() -> None:
    file = config(wan={"addresses": ["10.1.0.2/24"]}, lan={}, dmz={})
    after = add_interface(config(wan={"addresses": ["10.0.0.2/24"]}), file, "dmz")
    assert list(after.network.interfaces) == ["wan", "dmz"]
    assert after.network.interfaces["wan"].addresses == ("10.0.0.2/24",)
    assert taps_of(after) == {"wan": "work-0", "dmz": "work-2"}
    assert after.digest() != file.digest()


def test_an_interface_in_front_would_have_anothers_tap() -> None:
    started, file = config(wan={}), config(lan={}, wan={})
    with pytest.raises(Busy, match="'wan' of VM 'work', which runs, has the TAP name work-0"):
        add_interface(started, file, "lan")
    named = config(lan={"tap": {"name": "lan0"}}, wan={})
    assert taps_of(add_interface(started, named, "lan")) == {"lan": "lan0", "wan": "work-0"}


def test_an_address_that_another_interface_still_has_is_refused() -> None:
    address = {"addresses": ["10.0.0.2/24"]}
    with pytest.raises(Busy, match=r"has the address 10\.0\.0\.2"):
        add_interface(config(wan=address), config(wan={}, lan=address), "lan")


def test_the_others_keep_their_taps_when_one_goes_and_comes_back() -> None:
    started = config(wan={}, lan={}, dmz={})
    left = remove_interface(started, "wan")
    assert taps_of(left) == {"lan": "work-1", "dmz": "work-2"}
    assert left.digest() != started.digest()
    # Nothing of that is left in the end, so no restart is asked for.
    again = add_interface(left, started, "wan")
    assert taps_of(again) == taps_of(started)
    assert again.digest() == started.digest()


def test_what_cannot_be_added_is_told() -> None:
    with pytest.raises(BadRequest, match="has no interface 'lan'"):
        add_interface(config(wan={}), config(wan={}), "lan")
    with pytest.raises(Busy, match="already"):
        add_interface(config(wan={}), config(wan={}, lan={}), "wan")
    assert remove_interface(config(wan={}), "lan") == config(wan={})
