from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft_common.errors import ServerError
from fedgraft_server.settings import FederationTable, GatewayTable, ServerDirectory, Settings

SETTINGS = Settings(federation=FederationTable(name="test", host="::1"))


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=64))
def test_round_trip_of_any_name(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    directory = ServerDirectory(tmp_path_factory.mktemp("server"))
    federation = FederationTable(name=name, host="fed.example.org")
    chosen = Settings(federation=federation, gateway=GatewayTable(burst=7))
    directory.write_settings(chosen)
    assert directory.settings() == chosen


def test_every_value_is_described_in_the_file() -> None:
    lines = SETTINGS.to_toml().splitlines()[2:]
    assert all("  # " in line for line in lines if line)


def test_addresses() -> None:
    assert SETTINGS.gateway_address == "[::1]:9443"
    assert SETTINGS.backbone_address == "[::1]:9445"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("port = 9443", "port = 0"), "gateway.port: found 0"),
        (("port = 9445", "port = 9443"), "ports: .*five different ports"),
        (('host = "::1"', 'host = "a b"'), "federation.host: found 'a b'"),
        (("burst = 500", "brust = 500"), "gateway.brust: found 500"),
        (("[gateway]", "[gateway"), "a TOML file"),
    ],
)
def test_a_wrong_file_names_the_key(tmp_path: Path, change: tuple[str, str], text: str) -> None:
    directory = ServerDirectory(tmp_path)
    changed = SETTINGS.to_toml().replace(*change, 1)
    directory.settings_file.write_text(changed, encoding="utf-8")
    with pytest.raises(ServerError, match=text):
        directory.settings()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="fedgraft server init DIR"):
        ServerDirectory(tmp_path).settings()
