from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedgraft_common.errors import IdentityError
from fedgraft_server.authority import Authority, create
from fedgraft_server.registry import Registry, Site
from fedgraft_server.settings import FederationTable, ServerDirectory, Settings

START = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)
DAY = dt.timedelta(days=1)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> dt.datetime:
        return self.time


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    directory = ServerDirectory(tmp_path_factory.mktemp("server") / "dir")
    settings = Settings(federation=FederationTable(name="test", host="localhost"))
    return create(directory, settings, START)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    with Registry(tmp_path / "registry.sqlite", clock) as opened:
        yield opened


def join(
    registry: Registry, authority: Authority, secret: str, node_key: str, now: dt.datetime = START
) -> Site:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    site, _ = registry.join(
        secret, node_key, lambda name: authority.issue_site(name, key, 9 * DAY, now)
    )
    return site


def test_a_site_joins_and_is_found_by_its_certificate(
    registry: Registry, authority: Authority
) -> None:
    secret = registry.invite("north", ("hospitals",), HOUR)
    site = join(registry, authority, secret, "key n")
    assert (site.name, site.groups, site.node_key) == ("north", ("hospitals",), "key n")
    assert (site.joined, site.revoked, site.expires) == (START, None, START + 9 * DAY)
    assert registry.site_of(site.fingerprint) == site
    assert registry.sites() == (site,)


def test_only_a_hash_of_the_secret_is_stored(registry: Registry, tmp_path: Path) -> None:
    secret = registry.invite("north", (), HOUR)
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"north" in stored
    assert secret.encode() not in stored


def test_a_secret_works_once(registry: Registry, authority: Authority) -> None:
    secret = registry.invite("north", (), HOUR)
    join(registry, authority, secret, "key n")
    with pytest.raises(IdentityError, match=r"used on 2030-01-01 00:00 UTC.*somebody else did"):
        join(registry, authority, secret, "key m")
    assert [site.node_key for site in registry.sites()] == ["key n"]


def test_an_expired_invite_is_refused(
    registry: Registry, authority: Authority, clock: Clock
) -> None:
    secret = registry.invite("north", (), HOUR)
    clock.time += HOUR + dt.timedelta(seconds=1)
    with pytest.raises(IdentityError, match="expired on 2030-01-01 01:00 UTC"):
        join(registry, authority, secret, "key n")
    assert registry.sites() == ()


def test_a_newer_invite_replaces_an_unused_one(registry: Registry, authority: Authority) -> None:
    old = registry.invite("north", (), HOUR)
    new = registry.invite("north", (), HOUR)
    with pytest.raises(IdentityError, match="did not give out or has replaced"):
        join(registry, authority, old, "key n")
    assert join(registry, authority, new, "key n").name == "north"


def test_a_failed_join_does_not_use_up_the_invite(registry: Registry, authority: Authority) -> None:
    join(registry, authority, registry.invite("north", (), HOUR), "key n")
    secret = registry.invite("south", (), HOUR)
    with pytest.raises(IdentityError, match="in the registry already"):
        join(registry, authority, secret, "key n")
    assert join(registry, authority, secret, "key s").name == "south"


def test_a_present_site_is_not_invited_again(registry: Registry, authority: Authority) -> None:
    join(registry, authority, registry.invite("north", (), HOUR), "key n")
    with pytest.raises(IdentityError, match="`fedgraft server revoke north` first"):
        registry.invite("north", (), HOUR)


def test_a_revoked_site_is_out_with_every_certificate(
    registry: Registry, authority: Authority
) -> None:
    site = join(registry, authority, registry.invite("north", (), HOUR), "key n")
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    registry.add_certificate(site, authority.issue_site("north", key, 20 * DAY, START))
    (renewed,) = registry.sites()
    assert renewed.expires == START + 20 * DAY
    assert registry.site_of(site.fingerprint) == registry.site_of(renewed.fingerprint)
    registry.revoke("north")
    for certificate in (site.fingerprint, renewed.fingerprint):
        with pytest.raises(IdentityError, match="site north, revoked on 2030-01-01"):
            registry.site_of(certificate)
    with pytest.raises(IdentityError, match="allowed: one of: \\(no site has joined\\)"):
        registry.revoke("north")


def test_an_unused_invite_can_be_taken_back(registry: Registry, authority: Authority) -> None:
    secret = registry.invite("north", (), HOUR)
    registry.revoke("north")
    with pytest.raises(IdentityError, match="did not give out or has replaced"):
        join(registry, authority, secret, "key n")
    with pytest.raises(IdentityError, match="no site has joined"):
        registry.revoke("north")


def test_certificates_from_before_a_revocation_stay_out_after_joining_again(
    registry: Registry, authority: Authority
) -> None:
    old = join(registry, authority, registry.invite("north", (), HOUR), "key n")
    registry.revoke("north")
    new = join(registry, authority, registry.invite("north", (), HOUR), "key 2")
    assert registry.site_of(new.fingerprint).node_key == "key 2"
    with pytest.raises(IdentityError, match="revoked"):
        registry.site_of(old.fingerprint)


def test_an_expired_certificate_is_refused(
    registry: Registry, authority: Authority, clock: Clock
) -> None:
    site = join(registry, authority, registry.invite("north", (), HOUR), "key n")
    clock.time += 10 * DAY
    with pytest.raises(IdentityError, match="site north, expired on 2030-01-10"):
        registry.site_of(site.fingerprint)


def test_an_unknown_certificate_is_refused(registry: Registry) -> None:
    with pytest.raises(IdentityError, match="registry does not know"):
        registry.site_of("00" * 32)


def test_another_process_is_seen_at_once(
    registry: Registry, authority: Authority, tmp_path: Path
) -> None:
    site = join(registry, authority, registry.invite("north", (), HOUR), "key n")
    assert registry.site_of(site.fingerprint).name == "north"
    before = registry.version
    with Registry(tmp_path / "registry.sqlite") as other:
        other.revoke("north")
    assert registry.version != before
    with pytest.raises(IdentityError, match="revoked"):
        registry.site_of(site.fingerprint)


def test_members_by_name_group_and_all(registry: Registry, authority: Authority) -> None:
    for name, groups in (("a", ("x",)), ("b", ("x", "y")), ("c", ()), ("d", ("x",))):
        join(registry, authority, registry.invite(name, groups, HOUR), f"key {name}")
    registry.revoke("d")
    assert registry.node_keys(group="x") == {"a": "key a", "b": "key b"}
    assert registry.node_keys(names=["c", "a", "c"]) == {"c": "key c", "a": "key a"}
    assert list(registry.node_keys()) == ["a", "b", "c"]
    with pytest.raises(IdentityError, match="found 'd'; allowed: one of: a, b, c"):
        registry.members(names=["a", "d"])
    with pytest.raises(IdentityError, match="found 'z'; allowed: one of: x, y"):
        registry.members(group="z")


def test_node_ids_are_64_bit_and_follow_the_superlink(
    registry: Registry, authority: Authority
) -> None:
    for name in "ab":
        join(registry, authority, registry.invite(name, (), HOUR), f"key {name}")
    registry.set_node_ids({"key a": 2**64 - 1, "key of nobody": 3})
    assert registry.node_ids() == {"a": 2**64 - 1}
    registry.set_node_ids({"key a": 7, "key b": 8})
    assert registry.node_ids(names=["b", "a"]) == {"b": 8, "a": 7}


def test_a_crash_in_the_middle_of_joining_changes_nothing(
    registry: Registry, authority: Authority
) -> None:
    secret = registry.invite("north", (), HOUR)

    def crash(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.join(secret, "key n", crash)  # type: ignore[arg-type]
    assert registry.sites() == ()
    assert join(registry, authority, secret, "key n").name == "north"


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b"no database" * 1000)
    with pytest.raises(IdentityError, match=r"r: found 'file is not a database'; .*backup"):
        Registry(tmp_path / "r")
