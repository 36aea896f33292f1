"""Joining, loading and renewing, over real TLS."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.client
import json
import logging
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedgraft_client.identity import Identity, join, load_identity, renew_if_due
from fedgraft_common.certificates import private_pem, read_certificate, read_private_key
from fedgraft_common.errors import IdentityError
from fedgraft_common.invite import Invite
from fedgraft_common.site_signature import key_fingerprint, verify

if TYPE_CHECKING:
    from conftest import Federation  # type: ignore[import-not-found]
else:
    Federation = Any

DAY = dt.timedelta(days=1)


def whoami(identity: Identity) -> httpx.Response:
    with httpx.Client(verify=identity.ssl_context(), trust_env=False) as client:
        return client.get(f"https://{identity.facts.gateway}/whoami")


def test_a_site_joins_and_the_gateway_knows_it(federation: Federation) -> None:
    identity = federation.join("north")
    assert identity.facts.site == "north"
    assert identity.facts.groups == ("all",)
    assert identity.directory.stat().st_mode & 0o777 == 0o700
    files = {file.name: file.stat().st_mode & 0o777 for file in identity.directory.iterdir()}
    assert files == dict.fromkeys(
        ["ca.pem", "site.pem", "site.key", "node.key", "node.pub", "operator.pub",
         "federation.json"], 0o600,
    )  # fmt: skip
    answer = whoami(identity).json()
    assert (answer["site"], answer["federation"]) == ("north", "test")
    with federation.registry as registry:
        assert registry.node_keys() == {"north": (identity.directory / "node.pub").read_text()}


def test_private_keys_do_not_travel(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    original = httpx.Client.stream

    def stream(self: httpx.Client, method: str, url: str, *, content: bytes) -> Any:
        sent.append(content)
        return original(self, method, url, content=content)

    monkeypatch.setattr(httpx.Client, "stream", stream)
    identity = federation.join("north")
    joined = json.loads(sent[-1])
    assert set(joined) == {"secret", "request", "node_key"}
    for name in ("site.key", "node.key"):
        secret = (identity.directory / name).read_text().splitlines()[1]
        assert not any(secret.encode() in body for body in sent)
        assert all(b"PRIVATE" not in body for body in sent)


def test_flower_reads_the_node_key(federation: Federation) -> None:
    from flwr.supercore.primitives.asymmetric import (
        bytes_to_private_key,
        bytes_to_public_key,
        public_key_to_bytes,
        uses_nist_ec_curve,
    )

    identity = federation.join("north")
    written = (identity.directory / "node.pub").read_bytes()
    key = bytes_to_private_key((identity.directory / "node.key").read_bytes())
    assert public_key_to_bytes(key.public_key()) == written
    assert uses_nist_ec_curve(bytes_to_public_key(written))


def test_a_site_signs_and_its_peers_know_the_signature(federation: Federation) -> None:
    """Also after the certificate was renewed: the key stays, and with it what peers know."""
    north, south = federation.join("north"), federation.join("south")
    keys = [north.site_key()]
    federation.clock.ahead = 80 * DAY
    renewed = renew_if_due(north, federation.clock)
    assert renewed is not None
    keys.append(renewed.site_key())
    assert keys[0].certificate != keys[1].certificate
    trust = south.trust(federation.clock())
    for key in keys:
        public = trust.check("north", key.certificate_der)
        assert key_fingerprint(public) == key_fingerprint(keys[0].key.public_key())
        verify(public, "roster", b"text", key.sign("roster", b"text"), "north")
    with pytest.raises(IdentityError, match="certificate of site north"):
        trust.check("north", south.site_key().certificate_der)


# --- refused joins


def test_replayed_join(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    invite = federation.invite("north")
    join(invite, federation.home / "first", federation.clock)
    with caplog.at_level(logging.INFO), pytest.raises(IdentityError, match="somebody else did"):
        join(invite, federation.home / "second", federation.clock)
    assert not (federation.home / "second").exists()
    assert [record.action for record in caplog.records if hasattr(record, "action")] == [
        "refuse-join"
    ]


def test_expired_invite_is_refused_by_both_sides(federation: Federation) -> None:
    invite = federation.invite("north", dt.timedelta(minutes=5))
    late = federation.clock() + dt.timedelta(hours=1)
    with pytest.raises(IdentityError, match="Check this machine's clock"):
        join(invite, federation.home / "north", lambda: late)
    federation.clock.ahead = dt.timedelta(hours=1)
    with pytest.raises(IdentityError, match=r"answer of localhost:\d+: .*that expired on"):
        join(invite, federation.home / "north", lambda: late - dt.timedelta(hours=1))
    assert not (federation.home / "north").exists()


def test_another_ca_than_the_invites(federation: Federation) -> None:
    invite = Invite.decode(federation.invite("north"))
    other = invite.model_copy(update={"ca_sha256": "0" * 64}).encode()
    with pytest.raises(IdentityError, match="this is another server, or somebody is in between"):
        join(other, federation.home / "north", federation.clock)
    join(invite.encode(), federation.home / "north", federation.clock)  # the secret was not sent


def test_a_server_with_the_right_ca_certificate_but_not_its_own_from_it(
    federation: Federation,
) -> None:
    """Anybody can serve the CA's certificate; the second connection finds out."""
    invite = Invite.decode(federation.invite("north"))
    site = federation.join("south")  # its certificate is of the CA, but a client's
    with (
        impostor(federation, site) as port,
        pytest.raises(IdentityError, match="certificate verify failed"),
    ):
        elsewhere = invite.model_copy(update={"port": port})
        join(elsewhere.encode(), federation.home / "north", federation.clock)
    join(invite.encode(), federation.home / "north", federation.clock)


@pytest.mark.parametrize(
    "answer", [b"[" * 60_000, b"no json", b"[]", b'{"ca": "-"}', b" " * 70_000]
)
def test_a_server_that_answers_something_else(federation: Federation, answer: bytes) -> None:
    invite = Invite.decode(federation.invite("north"))
    site = federation.join("south")
    with impostor(federation, site, answer) as port:
        elsewhere = invite.model_copy(update={"port": port}).encode()
        with pytest.raises(IdentityError, match="the server's answer"):
            join(elsewhere, federation.home / "north", federation.clock)
    assert not (federation.home / "north").exists()


@contextlib.contextmanager
def impostor(federation: Federation, site: Identity, answer: bytes | None = None) -> Iterator[int]:
    """Serves the CA's certificate, or something else, with a site's certificate."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    ca = (site.directory / "ca.pem").read_text()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"ca": ca}).encode() if answer is None else answer
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    class Quiet(HTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.directory / "site.pem", site.directory / "site.key")
    with Quiet(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_no_server(federation: Federation) -> None:
    invite = Invite.decode(federation.invite("north"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = invite.model_copy(update={"port": taken.getsockname()[1]})
        with pytest.raises(IdentityError, match=r"Check name, port and firewall"):
            join(nowhere.encode(), federation.home / "north", federation.clock)


def test_a_directory_with_something_in_it_is_left_alone(federation: Federation) -> None:
    identity = federation.join("north")
    with pytest.raises(IdentityError, match="an identity is never overwritten"):
        join(federation.invite("south"), identity.directory, federation.clock)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/join", b"", 404),
        ("POST", "/ca", b"", 404),
        ("GET", "/ca?x", b"", 404),
        ("GET", "//ca", b"", 404),
        ("GET", "/whoami", b"", 404),
        ("POST", "/renew", b"", 404),
        ("POST", "/v1/fleet/pull-messages", b"", 404),
        ("POST", "/v1/control/start-run", b"", 404),
        ("POST", "/join", b"no json", 403),
        ("POST", "/join", b"[" * 50_000, 403),
        ("POST", "/join", b'{"secret":1,"request":"x","node_key":"y"}', 403),
        ("POST", "/join", b'{"secret":"s","request":"x","node_key":"y"}', 403),
        ("POST", "/join", b" " * 70_000, 413),
    ],
)
def test_what_the_joining_port_refuses(
    federation: Federation, method: str, path: str, body: bytes, status: int
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(federation.directory.ca[0])
    port = federation.settings.gateway.join_port
    with contextlib.closing(
        http.client.HTTPSConnection("localhost", port, context=context, timeout=10)
    ) as connection:
        connection.request(method, path, body)
        assert connection.getresponse().status == status


def test_a_request_head_without_end_is_cut(federation: Federation) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(federation.directory.ca[0])
    port = federation.settings.gateway.join_port
    with (
        socket.create_connection(("localhost", port), 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        received = b""
        with contextlib.suppress(OSError):
            connection.sendall(b"GET /ca HTTP/1.1\r\nx: " + b"y" * 300_000)
            received = connection.recv(1000)
        assert received in (b"",) or received.startswith(b"HTTP/1.1 400")


# --- renewal


def test_renewal_in_the_last_third(federation: Federation) -> None:
    federation.clock.ahead = -61 * DAY
    identity = federation.join("north")
    assert renew_if_due(identity, federation.clock) is None
    federation.clock.ahead = 0 * DAY
    renewed = renew_if_due(identity, federation.clock)
    assert renewed is not None
    assert abs(renewed.expires - identity.expires - 61 * DAY) < dt.timedelta(minutes=1)
    assert whoami(renewed).json()["site"] == "north"
    key = read_private_key(identity.directory / "site.key")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    with federation.registry as registry:
        (site,) = registry.sites()
        serial = read_certificate(identity.directory / "site.pem").serial_number
        assert site.serial == f"{serial:x}"
    assert renew_if_due(renewed, federation.clock) is None


def test_after_expiry_renewal_is_over_and_says_so(federation: Federation) -> None:
    identity = federation.join("north")
    late = federation.clock() + 91 * DAY
    with pytest.raises(IdentityError, match=r"site\.pem: .*expired on .*invite it again"):
        renew_if_due(identity, lambda: late)
    with pytest.raises(IdentityError, match="expired on"):
        load_identity(identity.directory, lambda: late)
    federation.clock.ahead = 91 * DAY  # the server's clock decides for a client that ignores it
    answer = whoami(identity)
    assert answer.status_code == 403
    assert "expired on" in answer.json()["error"]


def test_a_revoked_site_cannot_renew(federation: Federation) -> None:
    federation.clock.ahead = -61 * DAY
    identity = federation.join("north")
    federation.clock.ahead = 0 * DAY
    with federation.registry as registry:
        registry.revoke("north")
    with pytest.raises(IdentityError, match="site north, revoked on"):
        renew_if_due(identity, federation.clock)


def test_renewal_is_for_the_same_key_only(federation: Federation) -> None:
    identity = federation.join("north")
    other = ec.generate_private_key(ec.SECP256R1())
    from fedgraft_client.identity import _request

    with httpx.Client(verify=identity.ssl_context(), trust_env=False) as client:
        url = f"https://{identity.facts.gateway}/renew"
        for text in (_request("north", other), "nonsense"):
            assert client.post(url, content=text.encode()).status_code == 403


# --- loading


@pytest.mark.parametrize(
    "name",
    ["ca.pem", "site.pem", "site.key", "node.key", "operator.pub", "federation.json"],
)
def test_each_file_is_needed_whole(federation: Federation, name: str) -> None:
    directory = federation.join("north").directory
    (directory / name).write_bytes(b"damaged")
    with pytest.raises(IdentityError, match=name):
        load_identity(directory)
    (directory / name).unlink()
    with pytest.raises(IdentityError, match=rf"{name}: found 'no such file'"):
        load_identity(directory)


def test_keys_and_certificates_of_others(federation: Federation, tmp_path: Path) -> None:
    north, south = federation.join("north").directory, federation.join("south").directory
    for name, text in (
        ("site.key", "does not belong to site.pem"),
        ("site.pem", "does not belong to site.pem"),
    ):
        mixed = tmp_path / f"mixed-{name}"
        shutil.copytree(north, mixed)
        shutil.copy(south / name, mixed / name)
        with pytest.raises(IdentityError, match=text):
            load_identity(mixed)
    (north / "node.key").write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(IdentityError, match="an EC P-384 key"):
        load_identity(north)
    shutil.copy(federation.directory.server[0], south / "ca.pem")
    with pytest.raises(IdentityError, match=r"a certificate that ca\.pem did not issue"):
        load_identity(south)


def test_a_clock_that_is_behind(federation: Federation) -> None:
    directory = federation.join("north").directory
    with pytest.raises(IdentityError, match="Set this machine's clock right"):
        load_identity(directory, lambda: federation.clock() - DAY)
