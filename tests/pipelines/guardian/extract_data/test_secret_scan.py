"""Which lines contain a secret, and which only look like it."""

import pytest

from pipelines.guardian.extract_data import secret_scan

AWS_KEY = "AKIA" + "Q3EGSNPL5NHYD2K7"
RANDOM = "zX8kQ2mN5vB7cD9f" + "G1hJ3kL6pO4iU0yT"


@pytest.mark.parametrize(
    ("path", "line", "kind"),
    [
        ("a.py", f'key = "{AWS_KEY}"', "AWS Access Key"),
        ("a.py", f'client = connect("{AWS_KEY}")', "AWS Access Key"),
        ("a.py", 'password = "hunter2-is-not-it"', "Secret Keyword"),
        ("a.go", 'password := "hunter2-is-not-it"', "Secret Keyword"),
        ("a.md", "export API_KEY=abc123def456", "Secret Keyword"),
        (".env", "DB_PASSWORD=abc123def456", "Secret Keyword"),
        ("a.ts", 'fetch("https://ada:lovelace1@example.org/")', "Basic Auth Credentials"),
        ("a.rs", f'let token = "{RANDOM}";', "Base64 High Entropy String"),
    ],
)
def test_secrets_are_found_by_line_and_kind(path: str, line: str, kind: str) -> None:
    leaks = secret_scan.find(path, f"first line\n{line}\nlast line")
    assert (2, kind) in {(leak.line, leak.kind) for leak in leaks}
    assert all(leak.value in line for leak in leaks)


@pytest.mark.parametrize(
    "line",
    [
        "password = get_password()",
        'password = "<your password>"',
        'password = "${PASSWORD}"',
        f'token = "{RANDOM}"  # pragma: allowlist secret',
        'version = "8.8.8.8"',
        'alphabet = "abcdefghijklmnopqrstuvwxyz"',
        "def check_password(password: str) -> bool:",
    ],
)
def test_harmless_lines_are_not_reported(line: str) -> None:
    assert secret_scan.find("a.py", line) == []


def test_all_lines_of_a_private_key_are_secret() -> None:
    text = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEAx\nAbCdEfGhIjKl\n-----END RSA PRIVATE KEY-----\nafter it"
    assert [leak.line for leak in secret_scan.find("a.md", text)] == [1, 2, 3]


def test_the_repr_of_a_leak_hides_its_value() -> None:
    (leak,) = secret_scan.find("a.py", f'key = "{AWS_KEY}"')
    assert AWS_KEY not in repr(leak)
