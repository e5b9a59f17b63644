"""Single values: what is refused and how that is told; digests, saved configurations, the check program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from unit.test_config_load import GLOBAL, facts, load, load_vm
from vmsilod.config import CrosvmOptions, VmConfig
from vmsilod.config.color import NAMED_COLORS, parse_color

DAEMON = Path(__file__).parents[2] / "daemon"


@pytest.mark.parametrize(
    ("line", "key", "fact"),
    [
        ("memory = 63", "memory", "63 is below 64 MiB"),
        ("memory = 1024.0", "memory", "1024.0 is not a whole number"),
        ("memory = true", "memory", "true is not a whole number"),
        ("cpus = 255", "cpus", "255 is above 254"),
        ("cpus = 0", "cpus", "0 is below 1"),
        ("auto_start = 1", "auto_start", "1 is not true or false"),
        ('vmm = "xen"', "vmm", "'xen' is not one of 'auto', 'crosvm', 'qemu' or 'cloud-hypervisor'"),
        ('crosvm = "x"', "crosvm", "'x' is not a table"),
        ('depends_on = "b"', "depends_on", "'b' is not a list"),
        ("depends_on = [1]", "depends_on.0", "1 is not a string"),
        ('depends_on = ["b", "b"]', "depends_on", "names b more than once"),
        ('kernel = "vmlinuz"', "kernel", "'vmlinuz' is not an absolute path"),
        ('root_disk = {path = "/a", format = "qcow2"}', "root_disk.format", "'qcow2' is not one of 'raw'"),
        ('root_disk = {format = "raw"}', "root_disk.path", "required, but not set"),
        ('root_disk = {paht = "/a", path = "/a"}', "root_disk", "unknown key 'paht' (did you mean 'path'?)"),
        ('[qemu]\naccell = "kvm"', "qemu", "unknown key 'accell' (did you mean 'accel'?)"),
        (
            "rootDiskReadonly = true",
            "",
            "unknown key 'rootDiskReadonly' (did you mean 'root_disk_readonly'?)",
        ),
        ("gpu = true", "", "unknown key 'gpu'"),
        ('"\\u001b[2J" = 1', "", "unknown key '\\x1b[2J'"),
        (
            'image = "../x"',
            "image",
            "'../x' is not an image name: up to 64 letters, digits, '.', '_' or '-'",
        ),
        ('color = "reddish"', "color", "'reddish' is not a colour: a CSS name, #rgb, #rrggbb or rgb(r,g,b)"),
        ('kernel_params = ["\\u00e4"]', "kernel_params", "'ä' is not ASCII"),
        ('kernel_params = ["a\\nb"]', "kernel_params", "'a\\nb' has a control character in it"),
        ('kernel_params = [""]', "kernel_params", "a parameter is empty"),
        (
            '[crosvm]\nextra_args = ["a\\u0000"]',
            "crosvm.extra_args.0",
            "'a\\x00' has a control character in it",
        ),
        ("usb_devices = 3", "usb_devices", "3 is not a list"),
        (
            'usb_devices = ["46d:c52b"]',
            "usb_devices.0.vendor",
            "'46d' is not a USB vendor or product: four hexadecimal digits",
        ),
        ('usb_devices = ["046d"]', "usb_devices.0.product", "required, but not set"),
        (
            'usb_devices = ["046d:c52b:\\u001b[2J"]',
            "usb_devices.0.serial",
            "'\\x1b[2J' is not a serial number: up to 126 printable ASCII characters",
        ),
        (
            'usb_devices = [{vendor = "046d", product = "c52b", seriel = "X"}]',
            "usb_devices.0",
            "unknown key 'seriel' (did you mean 'serial'?)",
        ),
        ("start_timeout = 3601", "start_timeout", "3601 is above 3600 seconds"),
    ],
)
def test_bad_value_is_told_as_a_short_fact(tmp_path: Path, line: str, key: str, fact: str) -> None:
    configuration = load(
        tmp_path, {"etc/vmsilo.toml": GLOBAL, "etc/vms.d/a.toml": line, "etc/vms.d/b.toml": ""}
    )
    assert facts(configuration) == [(key, fact)]
    assert set(configuration.vms) == {"b"}


def test_option_of_a_later_version_is_said_to_be_that(tmp_path: Path) -> None:
    configuration = load(tmp_path, {"etc/vmsilo.toml": GLOBAL, "etc/vms.d/a.toml": "guestPrograms = []"})
    assert configuration.problems[0].hint == "this version of vmsilo has no such option"


@pytest.mark.parametrize(
    "character", [",", '\\"', "'", "[", "]", "(", ")", "{", "}", "\\n", "\\u0007", "\\u202e"]
)
@pytest.mark.parametrize("key", ["kernel", "initramfs", "root_disk"])
def test_path_that_could_end_an_option_is_refused(tmp_path: Path, character: str, key: str) -> None:
    line = f'{key} = "/a{character}b"'
    configuration = load(tmp_path, {"etc/vmsilo.toml": GLOBAL, "etc/vms.d/a.toml": line})
    (problem,) = configuration.problems
    assert problem.key.split(".")[0] == key
    assert "in it" in problem.fact
    assert str(problem).isprintable()


def test_kernel_params_have_a_limit_in_all(tmp_path: Path) -> None:
    half = "x" * 749
    assert load_vm(tmp_path, f'kernel_params = ["{half}", "{half}y"]').kernel_params == (half, half + "y")
    configuration = load(
        tmp_path, {"etc/vmsilo.toml": GLOBAL, "etc/vms.d/a.toml": f'kernel_params = ["{half}", "{half}yz"]'}
    )
    assert facts(configuration) == [("kernel_params", "1501 bytes in all, above 1500")]


@pytest.mark.parametrize(
    ("text", "rgb"),
    [
        ("red", (255, 0, 0)),
        ("RebeccaPurple", (0x66, 0x33, 0x99)),
        ("#0f8", (0, 255, 0x88)),
        ("#2ecc71", (0x2E, 0xCC, 0x71)),
        ("rgb(1, 20,255)", (1, 20, 255)),
    ],
)
def test_colors(text: str, rgb: tuple[int, int, int]) -> None:
    assert parse_color(text) == rgb


@pytest.mark.parametrize(
    "text", ["", "#12", "#12345g", "rgb(256,0,0)", "rgb(1,2)", "rgb(-1,2,3)", "red\n", "#0f8\n"]
)
def test_what_is_no_color(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_color(text)


def test_all_names_of_css_are_known() -> None:
    assert len(NAMED_COLORS) == 148
    assert all(len(value) == 6 for value in NAMED_COLORS.values())


def test_saved_configuration_comes_back_the_same(tmp_path: Path) -> None:
    vm = load_vm(tmp_path, 'root_disk = "/d"\nkernel_params = ["a"]\n[qemu]\nextra_args = ["-x"]')
    again = VmConfig.from_json(vm.to_json())
    assert again == vm
    assert again.digest() == vm.digest()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"name": "a"}', "null"])
def test_what_is_no_saved_configuration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        VmConfig.from_json(text)


def test_usb_devices_are_tables_or_short(tmp_path: Path) -> None:
    text = 'usb_devices = ["046D:C52B", "0951:1666:a:b", {vendor = "1d6b", product = "0002", serial = "X"}]'
    vm = load_vm(tmp_path, text)
    assert [(rule.vendor, rule.product, rule.serial) for rule in vm.usb_devices] == [
        ("046d", "c52b", ""),
        ("0951", "1666", "a:b"),
        ("1d6b", "0002", "X"),
    ]
    assert vm.wants_usb
    assert not load_vm(tmp_path, "").wants_usb
    assert VmConfig.from_json(vm.to_json()) == vm


def test_only_the_controller_needs_a_restart(tmp_path: Path) -> None:
    plain, controller, rule = (
        load_vm(tmp_path, text).digest() for text in ("", "usb = true", 'usb_devices = ["046d:c52b"]')
    )
    assert plain != controller
    assert controller == rule


def test_one_device_for_two_vms_is_a_warning_that_disables_neither(tmp_path: Path) -> None:
    files = {
        "etc/vmsilo.toml": GLOBAL,
        "etc/vms.d/a.toml": 'usb_devices = ["046d:c52b", "046d:c52b"]',
        "etc/vms.d/b.toml": 'usb_devices = ["046d:c52b:X", "046D:C52B"]',
    }
    configuration = load(tmp_path, files)
    assert facts(configuration) == []
    (warning,) = configuration.warnings
    assert (warning.key, warning.fact) == ("usb_devices", "046d:c52b is also a rule of a")
    assert set(configuration.vms) == {"a", "b"}


def test_digest_changes_with_what_a_running_vm_is_made_of(tmp_path: Path) -> None:
    vm = load_vm(tmp_path, "memory = 512")
    assert vm.model_copy(update={"memory": 513}).digest() != vm.digest()
    assert vm.model_copy(update={"crosvm": CrosvmOptions(log_level="warn")}).digest() != vm.digest()
    assert vm.model_copy(update={"auto_start": True, "sources": ("/x",)}).digest() == vm.digest()


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmsilod.config.check", *arguments]
    environment = {"PYTHONPATH": str(DAEMON), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_check_program_lists_problems_and_fails(tmp_path: Path) -> None:
    load(tmp_path, {"etc/vmsilo.toml": 'user = "nobody"\n', "etc/vms.d/a.toml": "gpu = true\n"})
    result = run_check("--root", str(tmp_path / "etc"))
    assert result.returncode == 1
    assert result.stdout == (
        f"{tmp_path}/etc/vms.d/a.toml: unknown key 'gpu'\n    this version of vmsilo has no such option\n"
    )
    assert result.stderr == ""
    as_json = run_check("--json", "--root", str(tmp_path / "etc"))
    assert as_json.returncode == 1
    assert '"fact": "unknown key \'gpu\'"' in as_json.stdout


def test_check_program_says_that_all_is_well(tmp_path: Path) -> None:
    load(tmp_path, {"etc/vmsilo.toml": 'user = "nobody"\n', "etc/vms.d/a.toml": "", "etc/vms.d/b.toml": ""})
    result = run_check("--root", str(tmp_path / "etc"))
    assert (result.returncode, result.stdout) == (0, "2 VMs, no problems\n")
    assert run_check("--json", "--root", str(tmp_path / "etc")).stdout == "[]\n"


def test_configuration_needs_neither_bus_nor_glib() -> None:
    code = "import sys, vmsilod.config.check; print(sorted({'gi', 'pydbus', 'systemd'} & set(sys.modules)))"
    environment = {"PYTHONPATH": str(DAEMON), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
