"""What the files may say: one pydantic model per file, with its defaults and the checks of single values.

Called by the loader. A model never looks at the machine: whether a file or an account exists is
`checks.py`'s question. Absent (None) in a VM's file means "as the global file says".
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from vmsilod.config.color import parse_color

KERNEL_PARAMS_MAX = 1500  # bytes; x86 takes 2048 in all (COMMAND_LINE_SIZE), the rest is vmsilo's own
MEMORY_MAX = 16 * 1024 * 1024  # MiB
TIMEOUT_MAX = 3600  # seconds
VM_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
# vmsilo's own units are vmsilo-relayd.* and so on; such a VM's vmsilo-NAME.socket would replace one.
RESERVED_NAMES = frozenset({"relayd", "balloond", "consoled"})
_IMAGE_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
_ACCOUNT = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
# A path is put into `key=value,key=value` options: crosvm ends a word at , " ' [ ] and QEMU at a comma.
_ENDS_A_VALUE = re.compile(r"""[,"'\[\](){}]""")

LogLevel = Literal["error", "warn", "info", "debug", "trace"]
VmmChoice = Literal["auto", "crosvm", "qemu"]
Accel = Literal["auto", "kvm", "tcg"]
Machine = Literal["auto", "microvm", "q35"]
DiskFormat = Literal["raw"]


def check_vm_name(name: str) -> str:
    if not VM_NAME.fullmatch(name):
        raise ValueError(
            f"'{name}' is not a VM name: a lower-case letter, then at most 30 of a-z, 0-9 and '-'"
        )
    if name in RESERVED_NAMES:
        raise ValueError(f"'{name}' is the name of a part of vmsilo")
    return name


def _check_image(name: str) -> str:
    if not _IMAGE_NAME.fullmatch(name):
        raise ValueError(f"'{name}' is not an image name: up to 64 letters, digits, '.', '_' or '-'")
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


def _expand_disk(value: Any) -> Any:  # whatever TOML gave; pydantic checks the result
    return {"path": value} if isinstance(value, str) else value


AbsolutePath = Annotated[str, AfterValidator(_check_path)]
VmName = Annotated[str, AfterValidator(check_vm_name)]
ImageName = Annotated[str, AfterValidator(_check_image)]
AccountName = Annotated[str, AfterValidator(_check_account)]
Color = Annotated[str, AfterValidator(_check_color)]
Seconds = Annotated[int, Field(ge=1, le=TIMEOUT_MAX)]
# strict=False on the tuple alone: TOML has lists; what is in them stays strict.
Arguments = Annotated[tuple[Annotated[str, AfterValidator(_check_argument)], ...], Field(strict=False)]
KernelParams = Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_check_kernel_params)]
VmNames = Annotated[tuple[VmName, ...], Field(strict=False), AfterValidator(_check_no_duplicates)]


class Table(BaseModel):
    """What every table of a file has in common: unknown keys refused, no type converted, no change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RootDisk(Table):
    path: AbsolutePath
    format: DiskFormat = "raw"


class CrosvmOptions(Table):
    log_level: LogLevel = "info"
    extra_args: Arguments = ()
    extra_run_args: Arguments = ()


class QemuOptions(Table):
    accel: Accel = "auto"
    machine: Machine = "auto"
    extra_args: Arguments = ()


class VmCrosvmOptions(Table):
    log_level: LogLevel | None = None
    extra_args: Arguments = ()
    extra_run_args: Arguments = ()


class VmQemuOptions(Table):
    accel: Accel | None = None
    machine: Machine | None = None
    extra_args: Arguments = ()


class GlobalConfig(Table):
    """vmsilo.toml."""

    user: AccountName
    vmm: VmmChoice = "auto"
    image: ImageName = "default"
    crosvm: CrosvmOptions = CrosvmOptions()
    qemu: QemuOptions = QemuOptions()
    start_timeout: Seconds = 180
    stop_timeout: Seconds = 30


class VmFile(Table):
    """vms.d/NAME.toml as written; `model.py` makes the VmConfig of it."""

    name: VmName
    memory: Annotated[int, Field(ge=64, le=MEMORY_MAX)] = 1024
    cpus: Annotated[int, Field(ge=1, le=254)] = 2
    color: Color = "red"
    image: ImageName | None = None
    kernel: AbsolutePath | None = None
    initramfs: AbsolutePath | None = None
    kernel_params: KernelParams = ()
    root_disk: Annotated[RootDisk | None, BeforeValidator(_expand_disk)] = None
    root_disk_readonly: bool = True
    vmm: VmmChoice | None = None
    crosvm: VmCrosvmOptions = VmCrosvmOptions()
    qemu: VmQemuOptions = VmQemuOptions()
    auto_start: bool = False
    depends_on: VmNames = ()
    start_timeout: Seconds | None = None
    stop_timeout: Seconds | None = None
