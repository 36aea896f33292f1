"""Whom a site knows: the first roster or the operator's word; all others count as colluders."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedgraft_client import site_cli
from fedgraft_client.ledger import Ledger
from fedgraft_client.peers import Peers, Rule, accept, accepted, known_peers, strangers
from fedgraft_common.errors import IdentityError
from fedgraft_common.secure_aggregation import SiteState
from fedgraft_common.secure_messages import Advertisement, Roster
from fedgraft_common.site_signature import SiteKey, key_fingerprint
from fedgraft_simulations.throwaway_keys import throwaway_authority, throwaway_key

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
AUTHORITY = throwaway_authority(NOW)
KEYS = {name: throwaway_key(AUTHORITY, name, NOW) for name in ("a", "b", "c", "d", "me")}
FORGED = {name: throwaway_key(AUTHORITY, name, NOW) for name in ("a", "b", "c", "x", "y")}


def print_of(key: SiteKey) -> str:
    return key_fingerprint(key.key.public_key())


def roster(*keys: SiteKey) -> Roster:
    every = sorted((*keys, KEYS["me"]), key=lambda key: key.name)
    return Roster(
        tuple(Advertisement(bytes(32), k.name, k.certificate_der, b"", b"", b"") for k in every)
    )


HONEST = roster(KEYS["a"], KEYS["b"], KEYS["c"])


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path, "x-rays") as opened:
        yield opened


def sign(ledger: Ledger, seen: Roster, rule: Rule | None, tolerated: int = 1) -> list[str]:
    """What a site does with a roster; the strangers in it."""
    said = Peers(ledger, ledger.path.parent / "peers", rule).meet(seen, "me", tolerated)
    assert said["roster"] == seen.digest.hex() and "me" not in said["peers"]
    ledger.keep_secure("plan", 1, "share", "r", SiteState(b"", b""), said)
    found: list[str] = said["strangers"]
    return found


def test_the_first_roster_is_known(ledger: Ledger) -> None:
    assert sign(ledger, HONEST, "first") == []
    assert known_peers(ledger.entries()) == {n: print_of(KEYS[n]) for n in "abc"}
    assert sign(ledger, HONEST, "first", 0) == []


@pytest.mark.parametrize(
    ("others", "found"),
    [
        (("a", "b"), ["a", "b"]),  # changed keys
        (("x", "y"), ["x", "y"]),  # invented sites
        (("a", "x"), ["a", "x"]),
    ],
)
def test_more_strangers_than_colluders_are_refused(
    ledger: Ledger, others: tuple[str, str], found: list[str]
) -> None:
    sign(ledger, HONEST, "first")
    before = ledger.entries()
    seen = roster(KEYS["c"], *(FORGED[name] for name in others))
    with pytest.raises(IdentityError, match=r"2 that .*a|x.*accept-peer"):
        sign(ledger, seen, "first")
    assert ledger.entries() == before
    assert strangers(ledger.path.parent / "peers") == {n: print_of(FORGED[n]) for n in found}
    assert sign(ledger, seen, "first", tolerated=2) == found


def test_a_stranger_that_was_let_pass_stays_one(ledger: Ledger) -> None:
    """Else a server would change the keys of one site in each set-up, until all are its own."""
    sign(ledger, HONEST, "first")
    assert sign(ledger, roster(FORGED["a"], KEYS["b"], KEYS["c"]), "first") == ["a"]
    assert sign(ledger, roster(FORGED["a"], KEYS["b"], KEYS["c"]), "first") == ["a"]
    with pytest.raises(IdentityError):
        sign(ledger, roster(FORGED["a"], FORGED["b"], KEYS["c"]), "first")
    assert known_peers(ledger.entries())["a"] == print_of(KEYS["a"])


def test_the_operator_vouches_for_a_new_key(ledger: Ledger) -> None:
    sign(ledger, HONEST, "first")
    folder = ledger.path.parent / "peers"
    spaced = print_of(FORGED["a"]).upper()
    accept(folder, "a", ":".join(spaced[i : i + 2] for i in range(0, 64, 2)))
    accept(folder, "d", print_of(KEYS["d"]))
    assert accepted(folder) == {"a": print_of(FORGED["a"]), "d": print_of(KEYS["d"])}
    seen = roster(FORGED["a"], KEYS["b"], KEYS["d"])
    assert sign(ledger, seen, "first", 0) == []
    written = [entry.body for entry in ledger.entries() if entry.kind.value == "peer"]
    assert written == [{"peer": n, "key": k} for n, k in accepted(folder).items()]
    assert sign(ledger, seen, "first", 0) == []
    assert len([e for e in ledger.entries() if e.kind.value == "peer"]) == 2  # once
    assert sign(ledger, HONEST, "first") == ["a"]  # the old key counts no more


def test_approved_only(ledger: Ledger) -> None:
    with pytest.raises(IdentityError, match="3 that this site does not know"):
        sign(ledger, HONEST, "approved", 2)
    for name in "ab":
        accept(ledger.path.parent / "peers", name, print_of(KEYS[name]))
    assert sign(ledger, HONEST, "approved") == ["c"]
    with pytest.raises(IdentityError):
        sign(ledger, HONEST, "approved", 0)


def test_a_key_accepted_before_the_first_roster_is_not_overruled_by_it(ledger: Ledger) -> None:
    accept(ledger.path.parent / "peers", "a", print_of(FORGED["a"]))
    assert sign(ledger, HONEST, "first") == ["a"]
    assert set(known_peers(ledger.entries())) == {"a", "b", "c"}


def test_a_simulation_knows_everybody(ledger: Ledger) -> None:
    assert sign(ledger, HONEST, None, 0) == sign(ledger, roster(*FORGED.values()), None, 0) == []


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers are shown, accepted, known after the next set-up."""
    (tmp_path / "site.toml").write_text(
        'classes = ["a", "b"]\n[data]\nname = "x-rays"\nsource = "x.npz"\nnominal_size = 9\n'
    )

    class Identity:
        def site_key(self) -> SiteKey:
            return KEYS["me"]

    monkeypatch.setattr("fedgraft_client.identity.load_identity", lambda _: Identity())

    def command(*arguments: str) -> str:
        options = ["--site", str(tmp_path / "site.toml")]
        result = CliRunner().invoke(site_cli.app, [*arguments, *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    def meet(seen: Roster) -> None:
        with Ledger(tmp_path / "home" / "x-rays", "x-rays") as ledger:
            sign(ledger, seen, "first")

    own = f"{print_of(KEYS['me'])}  me  (this site)\n"
    assert command("peers") == own
    meet(roster(KEYS["a"], KEYS["b"]))
    meet(roster(FORGED["a"], KEYS["b"]))
    shown = command("peers")
    assert shown.startswith(own)
    assert f"{print_of(KEYS['b'])}  b  (known)" in shown
    assert f"{print_of(FORGED['a'])}  a  (stranger)" in shown
    assert "Accepted a" in command("accept-peer", "a", print_of(FORGED["a"]))
    assert f"{print_of(FORGED['a'])}  a  (accepted, from the next set-up on)" in command("peers")
    meet(roster(FORGED["a"], FORGED["b"]))
    rows = json.loads(command("peers", "--json"))
    assert {"peer": "a", "key": print_of(FORGED["a"]), "is": "known"} in rows
    assert {"peer": "b", "key": print_of(FORGED["b"]), "is": "stranger"} in rows


@pytest.mark.parametrize(
    ("name", "fingerprint"), [("../a", "0" * 64), ("A", "0" * 64), ("a", "0" * 63), ("a", "g" * 64)]
)
def test_what_is_no_name_or_fingerprint(tmp_path: Path, name: str, fingerprint: str) -> None:
    with pytest.raises(IdentityError):
        accept(tmp_path / "peers", name, fingerprint)
    assert not (tmp_path / "peers").exists()
