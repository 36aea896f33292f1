from __future__ import annotations

import base64
import datetime as dt
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft_common.errors import IdentityError
from fedgraft_common.invite import Invite

SECRET = "s" * 43
INVITE = Invite(
    name="north",
    host="fed.example.org",
    port=9444,
    ca_sha256="ab" * 32,
    secret=SECRET,
    expires=dt.datetime(2030, 1, 2, tzinfo=dt.UTC),
)


def encoded(**changes: object) -> str:
    content = json.loads(INVITE.model_dump_json()) | changes
    return "fedgraft-invite-1." + base64.urlsafe_b64encode(json.dumps(content).encode()).decode()


@given(
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True),
    st.integers(1, 65535),
    st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(3000, 1, 1), timezones=st.just(dt.UTC)),
)
def test_round_trip(name: str, port: int, expires: dt.datetime) -> None:
    invite = INVITE.model_copy(update={"name": name, "port": port, "expires": expires})
    assert Invite.decode(invite.encode()) == invite


def test_is_one_printable_word_and_survives_line_breaks_of_a_mail_program() -> None:
    text = INVITE.encode()
    assert text.isascii() and text.isprintable() and " " not in text
    broken = " \n".join(text[i : i + 60] for i in range(0, len(text), 60))
    assert Invite.decode(f"  {broken}\r\n") == INVITE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        INVITE.encode()[:-9],
        INVITE.encode().replace("invite-1", "invite-2"),
        INVITE.encode() + "é",
        encoded(name="North"),
        encoded(name="-north"),
        encoded(host="a b"),
        encoded(host="a/b"),
        encoded(port=0),
        encoded(ca_sha256="ab"),
        encoded(**{"secret": "short"}),
        encoded(expires="2030-01-02T00:00:00"),
        encoded(more=1),
    ],
)
def test_anything_else_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(IdentityError, match="Copy it again, or ask for a new one") as caught:
        Invite.decode(text)
    assert SECRET not in str(caught.value)
    assert caught.value.field == "invite"


@given(st.binary(max_size=200))
def test_hostile_content_is_an_identity_error(content: bytes) -> None:
    text = "fedgraft-invite-1." + base64.urlsafe_b64encode(content).decode()
    with pytest.raises(IdentityError):
        Invite.decode(text)


def test_address_of_an_ipv6_host_has_brackets() -> None:
    assert INVITE.model_copy(update={"host": "::1"}).address == "[::1]:9444"
    assert INVITE.address == "fed.example.org:9444"
