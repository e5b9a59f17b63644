"""Rendered units against golden files that a person has read, and against systemd's own checker.

`VMSILO_UPDATE_GOLDEN=1 pytest tests/unit/test_units_render.py` rewrites the golden files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from vmsilod.config import VmConfig
from vmsilod.units.render import RenderedUnits, UnitContext, UnitPaths, render_units, user_name

GOLDEN = Path(__file__).parent / "golden" / "units"
CROSVM = UnitContext(owner="david", vmm="crosvm", groups=frozenset({"kvm", "video"}))
QEMU_PCI = UnitContext(owner="david", vmm="qemu", groups=frozenset({"kvm"}))
QEMU_HYBRID = UnitContext(owner="david", vmm="qemu", hybrid_cid=3)


def make_vm(**changes: object) -> VmConfig:
    values: dict[str, object] = {
        "name": "banking",
        "user": "david",
        "memory": 1024,
        "cpus": 2,
        "color": "red",
        "image": "default",
        "start_timeout": 180,
        "stop_timeout": 30,
        "sources": ["/etc/vmsilo/vms.d/banking.toml"],
    }
    return VmConfig.model_validate(values | changes)


def settings_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


CASES = {
    "crosvm": (make_vm(auto_start=True, depends_on=["sys-net", "vault"]), CROSVM),
    "cloud-hypervisor": (
        make_vm(name="builder", memory_max=4096),
        UnitContext(owner="david", vmm="cloud-hypervisor", groups=frozenset({"kvm"})),
    ),
    "qemu-pci": (make_vm(name="sys-net", pci_devices=["02:00.0"], depends_on=["vault"]), QEMU_PCI),
    "crosvm-forwards": (
        make_vm(
            network={
                "forward_ports": [
                    {"from": "host", "host": 2222, "guest": 22},
                    {"from": "guest", "guest": 5432, "host": 5432},
                    {"from": "guest", "guest": 53, "host": "[::1]:53"},
                ]
            }
        ),
        CROSVM,
    ),
    "qemu-shares": (
        make_vm(
            shared_home=True,
            shared_directories=[
                {"path": "/srv/two words", "tag": "books", "readonly": True},
                {"path": "/srv/all", "tag": "all", "uid_map": "0 0 65535", "gid_map": "0 0 65535"},
            ],
        ),
        QEMU_PCI,
    ),
    "cloud-hypervisor-shares": (
        make_vm(shared_directories=[{"path": "/srv", "tag": "one", "uid": 1234, "gid": 100}]),
        UnitContext(owner="david", vmm="cloud-hypervisor"),
    ),
    "qemu-hybrid": (make_vm(name="untrusted", stop_timeout=5, sources=[]), QEMU_HYBRID),
}


@pytest.mark.parametrize("case", CASES)
def test_units_are_as_agreed(case: str) -> None:
    rendered = render_units(*CASES[case])
    folder = GOLDEN / case
    if os.environ.get("VMSILO_UPDATE_GOLDEN"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, text in rendered.files.items():
            (folder / name).write_text(text)
    assert dict(rendered.files) == {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "changes", [{"usb": True}, {"usb_devices": [{"vendor": "0951", "product": "1666"}]}]
)
def test_only_a_qemu_with_a_usb_controller_may_open_a_netlink_socket(changes: dict[str, object]) -> None:
    families = "RestrictAddressFamilies=AF_NETLINK"
    texts = render_units(make_vm(**changes), QEMU_HYBRID).files
    assert families in settings_of(texts["vmsilo-banking-vm.service"])
    assert families in settings_of(texts["vmsilo-banking-debug.service"])
    assert families not in settings_of(texts["vmsilo-banking-vsock.service"])
    crosvm = render_units(make_vm(**changes), CROSVM).files["vmsilo-banking-vm.service"]
    assert families not in settings_of(crosvm)
    plain = render_units(make_vm(), QEMU_HYBRID).files["vmsilo-banking-vm.service"]
    assert families not in settings_of(plain)


def test_auto_start_is_a_link_into_the_target() -> None:
    link = "vmsilo-vms.target.wants/vmsilo-banking-vm.service"
    assert render_units(*CASES["crosvm"]).links == {link: "../vmsilo-banking-vm.service"}
    assert render_units(*CASES["qemu-hybrid"]).links == {}


def test_only_crosvm_is_restarted_and_only_on_guest_reset() -> None:
    crosvm = settings_of(render_units(make_vm(), CROSVM).files["vmsilo-banking-vm.service"])
    qemu = settings_of(render_units(make_vm(), QEMU_HYBRID).files["vmsilo-banking-vm.service"])
    assert "RestartForceExitStatus=32" in crosvm
    assert "Restart=no" in qemu
    assert not [line for line in qemu if line.startswith("RestartForce")]


def test_nothing_breaks_the_namespaces_that_crosvm_makes() -> None:
    crosvm = render_units(make_vm(), CROSVM).files["vmsilo-banking-vm.service"]
    keys = {line.partition("=")[0] for line in settings_of(crosvm)}
    assert not keys & {"RestrictNamespaces", "SystemCallFilter", "ProtectKernelTunables", "ProtectProc"}


def test_kvm_group_is_named_only_where_it_exists() -> None:
    text = render_units(make_vm(), QEMU_HYBRID).files["vmsilo-banking-vm.service"]
    assert "SupplementaryGroups" not in text
    assert "SupplementaryGroups=kvm\n" in render_units(make_vm(), CROSVM).files["vmsilo-banking-vm.service"]


def test_user_names_fit_and_differ() -> None:
    names = ["a", "a" * 21, "a" * 22, "a" * 31, "a" * 30 + "b", "b" * 22]
    users = [user_name(name) for name in names]
    assert len(set(users)) == len(users)
    assert max(len(user) for user in users) <= 31
    assert users[:2] == ["vmsilo-vm-a", "vmsilo-vm-" + "a" * 21]
    assert all(user.startswith("vmsilo-vx-") for user in users[2:])


@pytest.mark.parametrize("owner", ["", "a b", "a\nExecStart=/bin/sh", "a%n", "a\x1b", '"a"', "-a", "a\n"])
def test_owner_that_could_break_out_of_its_line_is_refused(owner: str) -> None:
    with pytest.raises(ValueError, match="user name"):
        render_units(make_vm(), UnitContext(owner=owner, vmm="crosvm"))


@pytest.mark.parametrize("path", ["lib", "/a b", "/a\n", "/a%n", "/a;b", "/$HOME", '/"'])
@pytest.mark.parametrize("which", ["libdir", "vhost_device_vsock"])
def test_path_that_could_break_out_of_its_line_is_refused(path: str, which: str) -> None:
    context = UnitContext(owner="david", vmm="crosvm", paths=UnitPaths(**{which: path}))
    with pytest.raises(ValueError, match="path"):
        render_units(make_vm(), context)


def test_source_with_a_line_feed_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be named"):
        render_units(make_vm(sources=["/x\n[Service]"]), CROSVM)


@pytest.mark.parametrize("cid", [0, 2, 2**32 - 1])
def test_reserved_cid_is_refused(cid: int) -> None:
    with pytest.raises(ValueError, match="CID"):
        render_units(make_vm(), UnitContext(owner="david", vmm="qemu", hybrid_cid=cid))


def write_units(folder: Path, rendered: RenderedUnits) -> None:
    for name, text in rendered.files.items():
        (folder / name).write_text(text)


def write_stubs(folder: Path) -> None:
    """The units that the generated ones refer to; what is shipped is another test's subject."""
    service = "[Service]\nExecStart=/bin/true\n"
    for name in ("vmsilod", "vmsilo-relayd"):
        (folder / f"{name}.service").write_text(service)
        (folder / f"{name}.socket").write_text(f"[Socket]\nListenStream=/run/stub/{name}\n")
    (folder / "vmsilo.slice").write_text("[Slice]\n")
    for name in ("sys-net", "vault"):
        (folder / f"vmsilo-{name}-vm.service").write_text(service)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("case", CASES)
def test_systemd_finds_nothing_to_say(tmp_path: Path, case: str) -> None:
    vm, context = CASES[case]
    programs = tmp_path / "lib"
    (programs / "bin").mkdir(parents=True)
    for program in ("bin/vmsilo-launch", "bin/vmsilo-forward", "bin/vmsilo-share", "vhost-device-vsock"):
        (programs / program).write_text("#!/bin/sh\n")
        (programs / program).chmod(0o755)
    paths = UnitPaths(libdir=str(programs), vhost_device_vsock=str(programs / "vhost-device-vsock"))
    folder = tmp_path / "units"
    folder.mkdir()
    write_stubs(folder)
    rendered = render_units(
        vm, UnitContext(context.owner, context.vmm, context.groups, context.hybrid_cid, paths)
    )
    write_units(folder, rendered)
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--", *(str(folder / name) for name in rendered.files)],
        env={"PATH": os.environ["PATH"], "SYSTEMD_UNIT_PATH": f"{folder}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    # Before systemd 257 that one line does nothing.
    said = [line for line in result.stderr.splitlines() if "Unknown key 'PrivatePIDs'" not in line]
    assert (result.returncode, result.stdout, said) == (0, "", [])


def test_forwards_into_the_guest_alone_need_no_network() -> None:
    network = {"forward_ports": [{"from": "host", "host": 2222, "guest": 22}]}
    text = render_units(make_vm(network=network), CROSVM).files["vmsilo-banking-forward.service"]
    assert "PrivateNetwork=yes" in settings_of(text)
    assert not [line for line in settings_of(text) if "AF_INET" in line]


def test_only_a_crosvm_with_an_interface_may_open_an_internet_socket() -> None:
    families = "RestrictAddressFamilies=AF_INET"
    online: dict[str, object] = {"network": {"interfaces": {"wan": {}}}}
    crosvm = render_units(make_vm(**online), CROSVM).files
    assert families in settings_of(crosvm["vmsilo-banking-vm.service"])
    assert families in settings_of(crosvm["vmsilo-banking-debug.service"])
    assert "PrivateNetwork=yes" in settings_of(crosvm["vmsilo-banking-vm.service"])
    qemu = render_units(make_vm(**online), QEMU_HYBRID).files["vmsilo-banking-vm.service"]
    assert families not in settings_of(qemu)
    assert families not in settings_of(render_units(make_vm(), CROSVM).files["vmsilo-banking-vm.service"])
