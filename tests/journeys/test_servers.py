"""The servers of a whole platform: through HAProxy, on two doors, and after the death of their monitor."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from websockets.sync.client import connect

from cluster.db import now
from cluster.services.capabilities.server_values import GB
from tests.support.platform import Platform
from tests.support.waiting import TIMEOUT, WEBSOCKET_OPTIONS, eventually

pytestmark = pytest.mark.platform


def test_this_machine_is_measured(platform: Platform) -> None:
    overview = platform.http.get("/api/servers/overview").json()
    assert overview["app_server"] is None
    server = overview["ai_server"]
    assert server["server_status"]["status"] == "online"
    assert server["memory"]["total_gb"] == round(psutil.virtual_memory().total / GB, 2)
    assert 0 <= server["cpu"]["usage_percent"] <= 100
    assert server["sources"]["this_machine"]["age_s"] < 60
    system = platform.http.get("/api/system/metrics").json()
    assert system["disk_percent"] > 0
    text = platform.http.get("/metrics").text
    assert 'server_cpu_usage_percent{server="ai_server"}' in text


def test_a_file_system_is_found_through_the_proxy(platform: Platform) -> None:
    for spelling in ("%2F", "%2Ftmp", "/tmp", "tmp"):
        response = platform.http.get(f"/api/storage-server/filesystems/{spelling}", follow_redirects=False)
        assert response.status_code == 200, (spelling, response.text)
        path = "/" if spelling == "%2F" else "/tmp"
        assert response.json()["mount_point"] == path
        assert response.json()["total_gb"] == round(shutil.disk_usage(Path(path)).total / GB, 2)
    missing = platform.http.get("/api/storage-server/filesystems/%2Fsrv", follow_redirects=False)
    assert (missing.status_code, missing.json()["error_code"]) == (404, "FILE_SYSTEM_NOT_FOUND")


def test_values_go_on_after_the_death_of_the_monitor(platform: Platform) -> None:
    url = f"{platform.url.replace('http', 'ws')}/ws/metrics"
    with connect(url, **WEBSOCKET_OPTIONS) as client:
        (monitor,) = platform.processes("ray::Monitor")
        monitor.kill()
        monitor.wait(TIMEOUT)
        eventually(lambda: platform.processes("ray::Monitor"))
        died_at = now()

        def is_updated() -> bool:
            update = json.loads(client.recv(TIMEOUT))
            return update.get("server_type") == "ai_server" and datetime.fromisoformat(update["timestamp"]) > died_at

        eventually(is_updated)
    eventually(lambda: platform.http.get("/health").json()["components"]["monitor"] == "running")
    assert platform.http.get("/api/servers/overview").json()["online_servers"] == 2
