"""`fedgraft site check` against a real gateway."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fedgraft_client.check import Checkup, Result

if TYPE_CHECKING:
    from conftest import Federation  # type: ignore[import-not-found]
else:
    Federation = Any

SITE = """
classes = ["even", "odd"]
[data]
source = "train.npz"
nominal_size = 60
"""


@pytest.fixture
def site(tmp_path: Path, federation: Federation) -> Path:
    images = np.random.default_rng(0).random((60, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "train.npz", images=images, labels=np.arange(60) % 2)
    (tmp_path / "site.toml").write_text(SITE)
    identity = federation.join("north")
    shutil.copytree(identity.directory, tmp_path / "home" / "identity")
    return tmp_path / "site.toml"


def checked(checkup: Checkup) -> dict[str, Result]:
    return {result.name: result for result in checkup.run()}


def test_a_site_that_has_joined_is_all_green(site: Path) -> None:
    found = checked(Checkup(site))
    assert {name: result.ok for name, result in found.items()} == dict.fromkeys(found, True)
    assert "north of test; certificate for 90 more days" in found["identity"].found
    assert "over mutual TLS" in found["connection"].found


def test_what_is_wrong_with_the_connection(
    site: Path, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedgraft_client.check.find_backbone", lambda *_: (None, False))
    slow = checked(Checkup(site, clock=lambda: time.time() + 60))["clock"]
    assert slow.ok is False
    assert "60.0 s ahead of the server's" in slow.found
    late = checked(Checkup(site, clock=lambda: time.time() + 100 * 86400))
    assert late["identity"].ok is False
    assert late["connection"].ok is None
    with federation.registry as registry:
        registry.revoke("north")
    gone = checked(Checkup(site))
    assert (gone["identity"].ok, gone["connection"].ok, gone["clock"].ok) == (True, False, None)
    assert gone["connection"].action


def test_no_gateway(site: Path, federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedgraft_client.check.find_backbone", lambda *_: (None, False))
    facts = site.parent / "home" / "identity" / "federation.json"
    port = federation.settings.gateway.port
    facts.write_text(facts.read_text().replace(f":{port}", ":1"))
    found = checked(Checkup(site))["connection"]
    assert found.ok is False
    assert "Check name, port and firewall (outbound)" in found.action
