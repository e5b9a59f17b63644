"""What the files may say: one pydantic model per file, with its defaults and the checks of single values.

Called by the loader. A model never looks at the machine: whether a file or an account exists is
`checks.py`'s question. Absent (None) in a VM's file means "as the global file says".
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from vmsilod.config.color import parse_color
from vmsilod.config.disks import DiskOptions
from vmsilod.config.disposables import DisposableOptions
from vmsilod.config.image_options import GlobalImage, VmImage, expand_image
from vmsilod.config.network import HostNetworkingOptions, NetworkOptions
from vmsilod.config.shares import SharedDirectories, SharedHome, SharedHomeDefault
from vmsilod.config.table import Table
from vmsilod.pci.address import parse_address

KERNEL_PARAMS_MAX = 1500  # bytes; x86 takes 2048 in all (COMMAND_LINE_SIZE), the rest is vmsilo's own
MEMORY_MAX = 16 * 1024 * 1024  # MiB
TIMEOUT_MAX = 3600  # seconds
VM_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
# vmsilo's own units are vmsilo-relayd.* and so on; such a VM's vmsilo-NAME.socket would replace one.
RESERVED_NAMES = frozenset({"relayd", "balloond", "consoled"})
_ACCOUNT = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
# A path is put into `key=value,key=value` options: crosvm ends a word at , " ' [ ] and QEMU at a comma.
_DEVICE_TYPE = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_OPTION_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_ENDS_A_VALUE = re.compile(r"""[,"'\[\](){}]""")

_USB_ID = re.compile(r"[0-9a-fA-F]{4}")
_USB_SERIAL = re.compile(r"[!-~](?:[ -~]{0,124}[!-~])?")

LogLevel = Literal["error", "warn", "info", "debug", "trace"]
VmmChoice = Literal["auto", "crosvm", "qemu", "cloud-hypervisor"]
Accel = Literal["auto", "kvm", "tcg"]
Machine = Literal["auto", "microvm", "q35"]
DiskFormat = Literal["raw"]
CloudHypervisorLogLevel = Literal["warn", "info", "debug", "trace"]
RestartWhen = Literal["no", "on-crash"]


def check_vm_name(name: str) -> str:
    if not VM_NAME.fullmatch(name):
        raise ValueError(
            f"'{name}' is not a VM name: a lower-case letter, then at most 30 of a-z, 0-9 and '-'"
        )
    if name in RESERVED_NAMES:
        raise ValueError(f"'{name}' is the name of a part of vmsilo")
    return name


def _check_account(name: str) -> str:
    if not _ACCOUNT.fullmatch(name):
        raise ValueError(f"'{name}' is not a user name")
    return name


def _check_color(text: str) -> str:
    parse_color(text)
    return text


def _check_path(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError(f"'{path}' is not an absolute path")
    if not path.isprintable():
        raise ValueError(f"'{path}' has a control character in it")
    if bad := _ENDS_A_VALUE.search(path):
        raise ValueError(f"'{path}' has {bad[0]} in it, which would end an option of crosvm or QEMU")
    if ".." in PurePosixPath(path).parts:
        raise ValueError(f"'{path}' has '..' in it")
    return path


def _check_argument(text: str) -> str:
    if not text:
        raise ValueError("an argument is empty")
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ValueError(f"'{text}' has a control character in it")
    return text


def _check_kernel_params(params: tuple[str, ...]) -> tuple[str, ...]:
    for param in params:
        if not param.isascii():
            raise ValueError(f"'{param}' is not ASCII")
        if not param.isprintable():
            raise ValueError(f"'{param}' has a control character in it")
        if not param.strip():
            raise ValueError("a parameter is empty")
    length = len(" ".join(params))
    if length > KERNEL_PARAMS_MAX:
        raise ValueError(f"{length} bytes in all, above {KERNEL_PARAMS_MAX}")
    return params


def _check_no_duplicates(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names {', '.join(twice)} more than once")
    return names


def _check_device_type(name: str) -> str:
    if not _DEVICE_TYPE.fullmatch(name):
        raise ValueError(f"'{name}' is not a type of vhost-user device, such as fs or net")
    return name


def _check_option(value: Any) -> Any:  # whatever TOML gave
    if isinstance(value, bool | int):
        return value
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        return tuple(value)
    if not isinstance(value, str):
        raise ValueError(f"'{value}' is not a string, number, boolean or list of numbers")
    return _check_argument(value)


def _split_options(value: Any) -> Any:  # whatever TOML gave; pydantic checks the result
    """Keys that are not ours are options of the device."""
    if not isinstance(value, dict) or "options" in value:
        return value
    own = {key: value[key] for key in ("type", "socket") if key in value}
    return own | {"options": {key: value[key] for key in value if key not in own}}


def _check_option_keys(options: dict[str, Any]) -> dict[str, Any]:
    for key in options:
        if not _OPTION_KEY.fullmatch(key):
            raise ValueError(f"'{key}' is not the name of an option")
    return options


def _expand_restart(value: Any) -> Any:  # as below
    return {"policy": value} if isinstance(value, str) else value


def _check_usb_id(text: str) -> str:
    if not _USB_ID.fullmatch(text):
        raise ValueError(f"'{text}' is not a USB vendor or product: four hexadecimal digits")
    return text.lower()


def _check_usb_serial(text: str) -> str:
    if text and not _USB_SERIAL.fullmatch(text):
        raise ValueError(f"'{text}' is not a serial number: up to 126 printable ASCII characters")
    return text


def _expand_usb_devices(value: Any) -> Any:  # whatever TOML gave; pydantic checks the result
    """ "046d:c52b" and "046d:c52b:SERIAL" mean the table with these three keys."""
    if not isinstance(value, list):
        return value
    keys = ("vendor", "product", "serial")
    return [
        dict(zip(keys, entry.split(":", 2), strict=False)) if isinstance(entry, str) else entry
        for entry in value
    ]


def _expand_disk(value: Any) -> Any:  # whatever TOML gave; pydantic checks the result
    return {"path": value} if isinstance(value, str) else value


def _expand_pci(value: Any) -> Any:  # as of _expand_disk
    return (
        [{"path": item} if isinstance(item, str) else item for item in value] if _is_list(value) else value
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _check_pci_once(devices: tuple[PciDevice, ...]) -> tuple[PciDevice, ...]:
    _check_no_duplicates(tuple(device.path for device in devices))
    return devices


AbsolutePath = Annotated[str, AfterValidator(_check_path)]
VmName = Annotated[str, AfterValidator(check_vm_name)]
AccountName = Annotated[str, AfterValidator(_check_account)]
Color = Annotated[str, AfterValidator(_check_color)]
UsbId = Annotated[str, AfterValidator(_check_usb_id)]
UsbSerial = Annotated[str, AfterValidator(_check_usb_serial)]
Seconds = Annotated[int, Field(ge=1, le=TIMEOUT_MAX)]
# strict=False on the tuple alone: TOML has lists; what is in them stays strict.
Arguments = Annotated[tuple[Annotated[str, AfterValidator(_check_argument)], ...], Field(strict=False)]
KernelParams = Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_check_kernel_params)]
PciAddress = Annotated[str, AfterValidator(parse_address)]
PciAddresses = Annotated[tuple[PciAddress, ...], Field(strict=False), AfterValidator(_check_no_duplicates)]
VmNames = Annotated[tuple[VmName, ...], Field(strict=False), AfterValidator(_check_no_duplicates)]


class RootDisk(Table):
    path: AbsolutePath
    format: DiskFormat = "raw"


class VhostUser(Table):
    """A vhost-user device; `options` are all the other keys of its table, for the VMM."""

    type: Annotated[str, AfterValidator(_check_device_type)]
    socket: AbsolutePath
    options: Annotated[
        dict[str, Annotated[Any, AfterValidator(_check_option)]], AfterValidator(_check_option_keys)
    ] = Field(default={})


VhostUserDevices = Annotated[
    tuple[Annotated[VhostUser, BeforeValidator(_split_options)], ...], Field(strict=False)
]


class PciDevice(Table):
    """A function that the VM gets; iommu: whether the guest gets an IOMMU before it."""

    path: PciAddress
    iommu: Literal["on", "off"] = "off"


PciDevices = Annotated[
    tuple[PciDevice, ...],
    Field(strict=False),
    BeforeValidator(_expand_pci),
    AfterValidator(_check_pci_once),
]


class UsbDevice(Table):
    """A USB device of the host, whichever port it is in; without a serial number every one of its kind."""

    vendor: UsbId
    product: UsbId
    serial: UsbSerial = ""


class CrosvmOptions(Table):
    log_level: LogLevel = "info"
    extra_args: Arguments = ()
    extra_run_args: Arguments = ()


class QemuOptions(Table):
    accel: Accel = "auto"
    machine: Machine = "auto"
    extra_args: Arguments = ()


class CloudHypervisorOptions(Table):
    log_level: CloudHypervisorLogLevel = "warn"
    extra_args: Arguments = ()


class VmCrosvmOptions(Table):
    log_level: LogLevel | None = None
    extra_args: Arguments = ()
    extra_run_args: Arguments = ()


class VmQemuOptions(Table):
    accel: Accel | None = None
    machine: Machine | None = None
    extra_args: Arguments = ()


class VmCloudHypervisorOptions(Table):
    log_level: CloudHypervisorLogLevel | None = None
    extra_args: Arguments = ()


class RestartPolicy(Table):
    """At most `limit` restarts within `within` seconds."""

    policy: RestartWhen = "no"
    limit: Annotated[int, Field(ge=1, le=100)] = 3
    within: Annotated[int, Field(ge=1, le=86400)] = 600


UsbDevices = Annotated[tuple[UsbDevice, ...], Field(strict=False), BeforeValidator(_expand_usb_devices)]


class GlobalConfig(Table):
    """vmsilo.toml."""

    user: AccountName
    vmm: VmmChoice = "auto"
    image: Annotated[GlobalImage, BeforeValidator(expand_image)] = GlobalImage()
    crosvm: CrosvmOptions = CrosvmOptions()
    qemu: QemuOptions = QemuOptions()
    cloud_hypervisor: CloudHypervisorOptions = CloudHypervisorOptions()
    isolated_pci_devices: PciAddresses = ()
    host_networking: HostNetworkingOptions = HostNetworkingOptions()
    disposables: DisposableOptions = DisposableOptions()
    shared_home: SharedHomeDefault = True
    start_timeout: Seconds = 180
    stop_timeout: Seconds = 30


class VmFile(DiskOptions):
    """vms.d/NAME.toml as written; `model.py` makes the VmConfig of it."""

    name: VmName
    memory: Annotated[int, Field(ge=64, le=MEMORY_MAX)] = 1024
    memory_max: Annotated[int | None, Field(ge=64, le=MEMORY_MAX)] = None
    cpus: Annotated[int, Field(ge=1, le=254)] = 2
    color: Color = "red"
    image: Annotated[VmImage | None, BeforeValidator(expand_image)] = None
    kernel: AbsolutePath | None = None
    initramfs: AbsolutePath | None = None
    kernel_params: KernelParams = ()
    root_disk: Annotated[RootDisk | None, BeforeValidator(_expand_disk)] = None
    root_disk_readonly: bool = True
    ssh: bool = True
    vmm: VmmChoice | None = None
    crosvm: VmCrosvmOptions = VmCrosvmOptions()
    qemu: VmQemuOptions = VmQemuOptions()
    usb: bool = False
    usb_devices: UsbDevices = ()
    cloud_hypervisor: VmCloudHypervisorOptions = VmCloudHypervisorOptions()
    vhost_user: VhostUserDevices = ()
    auto_start: bool = False
    disposable: bool = False
    depends_on: VmNames = ()
    restart: Annotated[RestartPolicy | None, BeforeValidator(_expand_restart)] = None
    pci_devices: PciDevices = ()
    network: NetworkOptions = NetworkOptions()
    shared_home: SharedHome | None = None
    shared_directories: SharedDirectories = ()
    start_timeout: Seconds | None = None
    stop_timeout: Seconds | None = None
