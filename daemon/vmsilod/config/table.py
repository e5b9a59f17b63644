"""What every table of a file has in common. Used by the models of this package; never by others."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Table(BaseModel):
    """Unknown keys refused, no type converted, no change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
