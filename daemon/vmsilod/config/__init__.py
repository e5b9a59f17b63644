"""The configuration: TOML files read, checked and resolved to frozen values.

Owns the meaning of /etc/vmsilo and /usr/share/vmsilo. Called by vmsilod (at start and when a file
changed) and by `vmsilo check`. It starts nothing, opens nothing but configuration files, and keeps no
state: every load reads anew.
"""

from vmsilod.config.load import (
    DEFAULT_ROOTS,
    Checks,
    Configuration,
    load_configuration,
)
from vmsilod.config.model import VmConfig
from vmsilod.config.problems import Problem
from vmsilod.config.schema import CrosvmOptions, GlobalConfig, QemuOptions, RootDisk

__all__ = [
    "DEFAULT_ROOTS",
    "Checks",
    "Configuration",
    "CrosvmOptions",
    "GlobalConfig",
    "Problem",
    "QemuOptions",
    "RootDisk",
    "VmConfig",
    "load_configuration",
]
