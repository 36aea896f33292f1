"""A site's connection with its certificate: renewed before it ends, a clear error after it."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse

from fedgraft_client import up
from fedgraft_client.up import RENEWAL, Link, backbones
from fedgraft_common.certificates import read_certificate
from fedgraft_common.errors import IdentityError
from fedgraft_common.plan import Plan

if TYPE_CHECKING:
    from conftest import Federation  # type: ignore[import-not-found]
else:
    Federation = Any

DAY = dt.timedelta(days=1)


class Seconds:
    """A monotonic clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def link(federation: Federation, tmp_path: Path, seconds: Seconds) -> Link:
    """A site's that joined 61 days ago, with a certificate of 90."""
    federation.upstream.answer = ActivateNodeResponse(node_id=5).SerializeToString()
    federation.clock.ahead = -61 * DAY
    identity = federation.join("north")
    federation.clock.ahead = 0 * DAY
    return Link(identity, tmp_path / "node", federation.clock, seconds)


def expiry(federation: Federation) -> dt.datetime:
    pem = federation.home / "north" / "site.pem"
    return read_certificate(pem).not_valid_after_utc


def test_a_new_connection_renews(federation: Federation, link: Link) -> None:
    before = expiry(federation)
    with link() as connection:
        assert connection.node_id == 5
    assert expiry(federation) > before + 60 * DAY


def test_a_connection_that_lasts_is_outdated_when_renewal_is_due(
    federation: Federation, link: Link, seconds: Seconds
) -> None:
    with link():  # renews
        assert not link.is_outdated()
        seconds.now += RENEWAL + 1
        assert not link.is_outdated()
        federation.clock.ahead = 61 * DAY
        assert not link.is_outdated()  # looks once an hour
        seconds.now += RENEWAL + 1
        assert link.is_outdated()
        assert not link.is_outdated()


def test_a_failed_renewal_does_not_cost_the_connection(
    federation: Federation, link: Link, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def refuse(*_: object) -> None:
        raise IdentityError("gateway", "HTTP 500", "an answer", "Wait.")

    monkeypatch.setattr(up, "renew_if_due", refuse)
    before = expiry(federation)
    with link() as connection:
        assert connection.node_id == 5
    assert expiry(federation) == before
    assert "certificate not renewed: gateway: found 'HTTP 500'" in caplog.text


def test_after_its_end_the_certificate_is_the_error(federation: Federation, link: Link) -> None:
    federation.clock.ahead = 30 * DAY
    with pytest.raises(IdentityError, match=r"site\.pem: found .*expired on .*invite it again"):
        link()
    assert not federation.upstream.seen  # nothing was asked of the SuperLink


def test_a_backbone_is_fetched_with_the_certificate_of_that_moment(
    federation: Federation, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    shown: list[bytes] = []

    def fetch(config: object, address: str, credentials: Any, *_: object) -> Any:
        shown.append(credentials.certificate)
        return nullcontext(tmp_path)

    monkeypatch.setattr(up, "plan_backbone", fetch)
    with backbones(link._identity, tmp_path / "backbones") as locate:
        locate(Plan())
        with link():  # renews
            locate(Plan())
    assert shown[0] != shown[1]
    assert shown[1] == (federation.home / "north" / "site.pem").read_bytes()
