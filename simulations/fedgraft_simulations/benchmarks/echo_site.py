"""A site that follows the protocol and does nothing else, as a resident process.

    python -m fedgraft_simulations.benchmarks.echo_site ADDRESS KEY.pem [STATUS]  # without TLS

Its replies differ from its requests: what is equal would not travel, because Flower addresses
objects by their hash.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedgraft_client.app import packed
from fedgraft_client.connection import Dialler, FleetConnection
from fedgraft_client.daemon import Daemon
from fedgraft_client.health import Health
from fedgraft_common.logs import set_up_logs
from fedgraft_common.messages import Status, read_request, write_reply

app = ClientApp(mods=[packed])  # for a stock SuperNode as well


@app.train()
def train(message: Message, context: Context) -> Message:
    """The adapter, moved a little, differently at every site and in every round."""
    request = read_request(message)
    step = np.float32((context.node_id % 1000 + 1) * 1e-6 * request.round)
    moved = ArrayRecord({n: Array(a.numpy() + step) for n, a in request.adapter.items()})
    return write_reply(message, request.round, Status.OK, moved)


@app.query()
def keep_final(message: Message, context: Context) -> Message:
    """The run's last message."""
    return write_reply(message, read_request(message).round, Status.KEPT)


def answer(name: str, connect: Callable[[], FleetConnection], status: Path | None = None) -> None:
    """Answers until a signal says otherwise."""
    set_up_logs(as_json=True)

    def write(health: Health) -> None:
        if status is not None:
            health.write(status)

    daemon = Daemon(name, connect, app, on_change=write)
    with daemon.signals():
        daemon.run()


def without_tls(address: str, key_file: Path) -> Dialler:
    """To a SuperLink on loopback.

    Raises:
        TypeError: the file holds no EC key.
    """
    key = load_pem_private_key(key_file.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError(f"{key_file} holds no EC key")
    return Dialler(address, key, tls=None, memory=key_file.with_suffix(".node"))


if __name__ == "__main__":
    file = Path(sys.argv[2])
    answer(file.stem, without_tls(sys.argv[1], file), *map(Path, sys.argv[3:4]))
