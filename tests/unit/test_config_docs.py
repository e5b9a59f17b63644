"""docs/configuration.md lists every option with its default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from vmsilod.config.network import InterfaceOptions
from vmsilod.config.schema import GlobalConfig, VmFile

TEXT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
SECTIONS = dict(re.findall(r"^##+ (.*?)\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))


def flatten(model: type[BaseModel], prefix: str = "") -> dict[str, object]:
    options: dict[str, object] = {}
    for key, information in model.model_fields.items():
        if isinstance(information.default, BaseModel):
            options |= flatten(type(information.default), f"{prefix}{key}.")
        else:
            options[prefix + key] = information.default
    return options


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("Global options", GlobalConfig),
        ("Options of a VM", VmFile),
        ("Options of an interface", InterfaceOptions),
    ],
)
def test_table_has_every_option_and_its_default(section: str, model: type[BaseModel]) -> None:
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| .*? \| (.*?) \| .*\|$", SECTIONS[section], re.MULTILINE)
    documented = dict(rows)
    options = flatten(model)
    assert documented.keys() == options.keys()
    for key, default in options.items():
        if isinstance(default, (bool, int, str)):
            assert documented[key] == f"`{json.dumps(default)}`"
        elif isinstance(default, tuple):
            assert documented[key] == "`[]`"
