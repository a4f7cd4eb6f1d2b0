"""API9, inventory: a port or a path that nobody has thought of."""

import re
from pathlib import Path

import pytest

from cluster.runtime import supervisor
from cluster.settings import load_settings

OPERATING = Path(__file__).parents[3] / "docs" / "operating.md"


@pytest.mark.usefixtures("home")
def test_find_a_port_that_is_not_documented_or_not_on_loopback() -> None:
    rows = dict(re.findall(r"^\| \d+ \| `([a-z_.]+)` \| ([^|;]+)", OPERATING.read_text(), re.MULTILINE))
    addresses = supervisor.listen_addresses(load_settings(["serve.host=0.0.0.0"]).settings)
    assert rows.keys() == addresses.keys()
    assert {setting for setting, (host, _) in addresses.items() if host != "127.0.0.1"} == {"serve.port"}
    assert {setting for setting, place in rows.items() if place.strip() != "loopback"} == {"serve.port"}
