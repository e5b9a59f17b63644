"""What polkit is told of host devices."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

POLICY = Path(__file__).parent.parent.parent / "polkit/org.vmsilo1.policy"


def test_no_action_is_declared_twice() -> None:
    actions = [action.attrib["id"] for action in ET.parse(POLICY).getroot().iter("action")]
    assert "org.vmsilo1.manage-devices" in actions
    assert len(actions) == len(set(actions))
