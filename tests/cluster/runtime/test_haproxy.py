"""The replacement of the haproxy command fits the configuration that this version of Ray Serve writes."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from cluster.runtime import haproxy
from tests.support.waiting import TIMEOUT

CONFIGURATION = """frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
backend default
    server replica 127.0.0.1:20000
listen stats
  bind *:8404
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_only_the_gateway_is_bound_to_the_host_of_the_setting(host: str) -> None:
    changed = haproxy.set_bind_addresses(CONFIGURATION, host).splitlines()
    original = CONFIGURATION.splitlines()
    differences = {old.strip(): new.strip() for old, new in zip(original, changed, strict=True) if old != new}
    expected = {"bind :9101": "bind 127.0.0.1:9101", "bind *:8404": "bind 127.0.0.1:8404"}
    if host != "127.0.0.1":
        expected["bind 127.0.0.1:8000"] = f"bind {host}:8000"
    assert differences == expected


def test_ray_serve_opens_no_unknown_port() -> None:
    """This test fails if a new version of Ray opens another port."""
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    templates = Path(ray.origin).parent / "serve" / "_private" / "haproxy_templates.py"
    binds = re.findall(r"^\s+bind (.*)$", templates.read_text(), re.MULTILINE)
    assert binds == [
        ":{{ config.metrics_port }}",
        "{{ config.frontend_host }}:{{ config.frontend_port }}",
        "{{ config.grpc_frontend_host }}:{{ config.grpc_frontend_port }} proto h2",
        "*:{{ config.stats_port }}",
    ]


def test_the_launcher_becomes_haproxy_with_all_arguments(tmp_path: Path) -> None:
    binary = tmp_path / "real"
    binary.write_text('#!/bin/sh\necho "$$" "$@"\n')
    binary.chmod(0o700)
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(CONFIGURATION)
    launcher = haproxy.write_launcher(tmp_path, binary, "0.0.0.0")
    arguments = ["-db", "-f", str(configuration), "-sf", "12", "34", "-x", "/tmp/haproxy.sock"]
    process = subprocess.Popen([launcher, *arguments], stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert output.split() == [str(process.pid), *arguments]
    assert "bind 0.0.0.0:8000" in configuration.read_text()
