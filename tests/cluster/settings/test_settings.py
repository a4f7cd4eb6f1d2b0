"""The four layers of settings, and the errors for invalid ones."""

from pathlib import Path

import pytest

from cluster.errors import SettingsError
from cluster.settings import LoadedSettings, load_settings

SIGNING_KEY = "a-signing-key-of-more-than-32-characters"


@pytest.fixture(autouse=True)
def own_file(home: Path) -> Path:
    home.mkdir()
    return home / "forgearr.yaml"


def row(loaded: LoadedSettings, setting: str) -> tuple[str, str]:
    return next((value, origin) for key, value, origin in loaded.rows() if key == setting)


def test_the_home_is_private(home: Path) -> None:
    home.rmdir()
    load_settings()
    assert home.stat().st_mode & 0o777 == 0o700


def test_each_layer_overrides_the_one_before(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert row(load_settings(), "serve.port") == ("8000", "configs/forgearr.yaml")
    own_file.write_text("serve:\n  port: 8001\n")
    assert row(load_settings(), "serve.port") == ("8001", str(own_file))
    monkeypatch.setenv("FORGEARR_SERVE__PORT", "8002")
    assert row(load_settings(), "serve.port") == ("8002", "environment variable FORGEARR_SERVE__PORT")
    assert row(load_settings(["serve.port=8003"]), "serve.port") == ("8003", "command line")


def test_values_from_the_environment_are_parsed_as_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    monkeypatch.setenv("FORGEARR_SERVE__ALLOWED_HOSTS", "[forge.example, forge.lan]")
    settings = load_settings(["mlflow.enabled=false"]).settings
    assert settings.auth.required is True
    assert settings.serve.allowed_hosts == ["forge.example", "forge.lan"]
    assert settings.mlflow.enabled is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serve.prot=1", "Unknown setting 'serve.prot' (set to 1 by command line)"),
        ("server.port=1", "Unknown setting 'server.port' (set to 1 by command line)"),
        ("serve.port=many", "Setting 'serve.port' cannot be 'many' (from command line)"),
        ("serve.port=70000", "Setting 'serve.port' cannot be 70000 (from command line)"),
        ("logs.level=LOUD", "Setting 'logs.level' cannot be 'LOUD' (from command line)"),
        ("serve.port", "--set takes key=value, not 'serve.port'"),
    ],
)
def test_an_invalid_setting_is_a_one_line_error(override: str, message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings([override])
    assert raised.value.message.startswith(message)
    assert "\n" not in raised.value.message


def test_a_file_that_is_not_yaml_is_named(own_file: Path) -> None:
    own_file.write_text("serve: [")
    with pytest.raises(SettingsError, match=f"^{own_file} is not valid YAML"):
        load_settings()


@pytest.mark.parametrize(
    ("setting", "value", "shown"),
    [
        ("auth.signing_key", SIGNING_KEY, "********"),
        ("database.url", "postgresql://ada:hunter22@db.lan/forge", "postgresql://ada:********@db.lan/forge"),
        ("database.url", "postgresql://ada@db.lan/forge?ssl=require", "postgresql://ada@db.lan/forge?********"),
        ("limits.storage", "redis://:hunter22@cache.lan:6379/0", "redis://:********@cache.lan:6379/0"),
        ("limits.storage", "memory://", "memory://"),
        ("mlflow.tracking_uri", "https://ada:hunter22@ml.lan:5001/x", "https://ada:********@ml.lan:5001/x"),
        ("mlflow.tracking_uri", "https://hunter22@ml.lan", "https://********@ml.lan"),
        ("mlflow.tracking_uri", "http://ml.lan:5001", "http://ml.lan:5001"),
        ("mlflow.tracking_uri", "http://[hunter22", "********"),
    ],
)
def test_secrets_are_not_shown(setting: str, value: str, shown: str, own_file: Path) -> None:
    section, _, name = setting.partition(".")
    own_file.write_text(f"{section}:\n  {name}: '{value}'\n")
    assert row(load_settings(), setting) == (shown, str(own_file))


@pytest.mark.parametrize("weak", ["changeme", "secret", "short"])
def test_a_weak_signing_key_is_refused_without_being_repeated(weak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_AUTH__SIGNING_KEY", weak)
    with pytest.raises(SettingsError, match="at least 32 characters") as raised:
        load_settings()
    assert f"'{weak}'" not in raised.value.message


@pytest.mark.parametrize(
    ("host", "cluster", "required", "registration", "is_required", "is_open"),
    [
        ("127.0.0.1", "null", "null", "null", False, True),
        ("127.0.0.1", "null", "null", "false", False, False),
        ("127.0.0.1", "null", "true", "null", True, False),  # behind a reverse proxy on the same machine
        ("127.0.0.1", "null", "true", "true", True, True),
        ("127.0.0.1", "null", "false", "null", False, True),
        ("0.0.0.0", "null", "null", "null", True, False),
        ("0.0.0.0", "null", "null", "true", True, True),
        ("0.0.0.0", "null", "true", "null", True, False),
        ("127.0.0.1", "head.example:6379", "null", "null", True, False),
        ("127.0.0.1", "head.example:6379", "null", "true", True, True),
        ("127.0.0.1", "head.example:6379", "true", "null", True, False),
        ("0.0.0.0", "head.example:6379", "null", "null", True, False),
    ],
)
def test_credentials_are_required_wherever_others_reach_the_gateway_and_registration_is_closed_there(
    host: str, cluster: str, required: str, registration: str, is_required: bool, is_open: bool
) -> None:
    changes = [f"serve.host={host}", f"ray.address={cluster}", f"auth.required={required}"]
    changes.append(f"auth.registration={registration}")
    settings = load_settings(changes).settings
    assert (settings.auth_required, settings.registration_open, settings.limits_enabled) == (
        is_required,
        is_open,
        is_required,
    )
    assert settings.url == "http://127.0.0.1:8000"


@pytest.mark.usefixtures("home")
def test_a_trusted_proxy_is_an_address_or_a_network() -> None:
    loaded = load_settings(["serve.trusted_proxies=[192.0.2.1, 10.0.0.0/8]"])
    assert loaded.settings.serve.trusted_proxies == ["192.0.2.1/32", "10.0.0.0/8"]
    for invalid in ("proxy.example", "10.0.0.1/8", "'; reboot"):
        with pytest.raises(SettingsError, match=r"serve\.trusted_proxies"):
            load_settings([f'serve.trusted_proxies=["{invalid}"]'])
