"""The proxy that plays a bad network must itself be trusted."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from fedgraft_simulations.federation.network import BadNetwork, Weather


@pytest.fixture
def network() -> Iterator[BadNetwork]:
    """In front of a server that sends back what it gets."""
    listening = socket.create_server(("127.0.0.1", 0))

    def echo(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                connection.sendall(data)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=echo, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    with BadNetwork(f"127.0.0.1:{listening.getsockname()[1]}", seed=3) as made:
        yield made
    listening.close()


def connect(network: BadNetwork) -> socket.socket:
    host, _, port = network.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def exchange(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    received = b""
    while len(received) < len(data):
        more = connection.recv(65536)
        if not more:
            break
        received += more
    return received


def test_fair_weather_changes_nothing(network: BadNetwork) -> None:
    data = bytes(range(256)) * 1000
    with connect(network) as connection:
        assert exchange(connection, data) == data
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert network.seen["bytes"] == 2 * len(data)


def test_delay_and_rate_take_their_time(network: BadNetwork) -> None:
    with connect(network) as connection:
        for weather in (Weather(delay=0.1), Weather(rate=10_000.0)):
            network.weather = weather
            started = time.monotonic()
            assert exchange(connection, b"x" * 1000) == b"x" * 1000
            assert time.monotonic() - started >= 0.19  # there and back


def test_a_swap_keeps_the_bytes_and_not_their_order(network: BadNetwork) -> None:
    network.weather = Weather(swap=1.0)
    with connect(network) as connection:
        connection.sendall(b"abcdef")
        assert sorted(connection.recv(100)) == sorted(b"abcdef")
    assert network.seen["swaps"] == 2


def test_a_cut_ends_the_connection(network: BadNetwork) -> None:
    with connect(network) as connection:
        assert exchange(connection, b"x") == b"x"
        network.cut()
        with pytest.raises(ConnectionError):
            while True:
                exchange(connection, b"x")
                time.sleep(0.01)
    network.weather = Weather(cut=1.0)
    with connect(network) as connection, contextlib.suppress(ConnectionError):
        assert len(exchange(connection, b"x" * 100)) < 100
    network.weather = Weather()
    with connect(network) as connection:
        assert exchange(connection, b"x") == b"x"


def test_silence_and_closed_doors(network: BadNetwork) -> None:
    with connect(network) as connection:
        network.weather = Weather(silent=True)
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            exchange(connection, b"x")
        network.weather = Weather(closed=True)
        connection.settimeout(5)
        assert connection.recv(1) == b"x"
        with contextlib.suppress(ConnectionError), connect(network) as refused:
            assert exchange(refused, b"x") == b""
    assert network.seen["refused"] == 1
