from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedgraft_common.certificates import fingerprint, read_certificate
from fedgraft_common.errors import FedgraftError, IdentityError, ServerError
from fedgraft_common.invite import Invite
from fedgraft_server.cli import app
from fedgraft_server.registry import Registry


def run(*arguments: str) -> str:
    """What the command prints; raises what it raises."""
    outcome = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "server"
    printed = run("init", str(path), "--host", "fed.example.org", "--name", "eu", "--port", "7000")
    assert "ports       7000 and 7002 for sites, 7001 for joining" in printed
    return path


def test_invite_prints_an_invite_and_nothing_else(directory: Path) -> None:
    printed = run("invite", "north", "--dir", str(directory), "--valid", "30m", "--group", "x")
    invite = Invite.decode(printed)
    assert printed == invite.encode() + "\n"
    assert (invite.name, invite.address) == ("north", "fed.example.org:7001")
    assert invite.ca_sha256 == fingerprint(read_certificate(directory / "ca.pem"))
    ahead = invite.expires - dt.datetime.now(dt.UTC)
    assert dt.timedelta(minutes=29) < ahead <= dt.timedelta(minutes=30)


def test_invite_into_a_private_file(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "invite"
    assert run("invite", "north", "--dir", str(directory), "--out", str(file)) == ""
    assert Invite.decode(file.read_text()).name == "north"
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["North"], "1 to 63 lower-case letters"),
        (["a" * 64], "1 to 63 lower-case letters"),
        (["north", "--valid", "soon"], "such as 30m, 24h or 7d"),
        (["north", "--valid", "0h"], "such as 30m, 24h or 7d"),
    ],
)
def test_a_wrong_invite_changes_nothing(directory: Path, arguments: list[str], text: str) -> None:
    before = {f.name for f in directory.iterdir()}
    with pytest.raises(IdentityError, match=text):
        run("invite", *arguments, "--dir", str(directory))
    assert {f.name for f in directory.iterdir()} == before


def test_init_refuses_a_used_directory_and_wrong_options(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="a CA is never overwritten"):
        run("init", str(directory), "--host", "localhost")
    with pytest.raises(ServerError, match=r"federation\.host: found 'a b'"):
        run("init", str(tmp_path / "other"), "--host", "a b")
    with pytest.raises(ServerError, match="port: found 65536"):
        run("init", str(tmp_path / "other"), "--host", "localhost", "--port", "65535")
    assert not (tmp_path / "other").exists()


def test_sites_and_revoke(directory: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    from fedgraft_server.authority import Authority
    from fedgraft_server.registry import utc_now
    from fedgraft_server.settings import ServerDirectory

    authority = Authority.load(ServerDirectory(directory))
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    with Registry(directory / "registry.sqlite") as registry:
        registry.join(
            registry.invite("north", ("x", "y"), dt.timedelta(hours=1)), "node key",
            lambda name: authority.issue_site(name, key, dt.timedelta(days=1), utc_now()),
        )  # fmt: skip
    (row,) = json.loads(run("sites", "--dir", str(directory), "--json"))
    assert (row["name"], row["groups"], row["revoked"]) == ("north", ["x", "y"], None)
    assert len(row["fingerprint"]) == 64
    assert "north  x, y" in run("sites", "--dir", str(directory))
    assert run("revoke", "north", "--dir", str(directory)) == "revoked     north\n"
    assert "revoked" in run("sites", "--dir", str(directory))
    with pytest.raises(IdentityError, match="List them with `fedgraft server sites`"):
        run("revoke", "north", "--dir", str(directory))


@pytest.mark.parametrize(
    "arguments", [["sites"], ["invite", "a"], ["revoke", "a"]], ids=lambda a: a[0]
)
def test_without_a_directory_nothing_is_made(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(FedgraftError, match=r"federation\.toml: found 'no such file'"):
        run(*arguments, "--dir", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
