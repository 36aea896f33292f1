"""A plan run on this machine by the production code, with every message that left a site kept.

The sites, the trainer, the egress guard, the server and its aggregation are those of production;
messages are function calls. What a site sent is written down as the bytes that Flower puts on the
network, so that an auditor looks at bytes and not at objects.

    <directory>/sites/<name>/ledger.sqlite3    what each site charged
    <directory>/server/                        checkpoints, final adapter
    <directory>/replies/<kind>-<round>-<site>.pb
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from fedgraft_client.app import client_app
from fedgraft_client.data import Records
from fedgraft_client.runtime import Runtime
from fedgraft_client.secure_member import Membership
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_common.errors import MessageError
from fedgraft_common.mechanism import StepNoise, step_noise
from fedgraft_common.messages import ADAPTER, Tensors, from_record, read_request
from fedgraft_common.plan import Plan
from fedgraft_server.federation import RoundSummary, server_app
from fedgraft_simulations.local_grid import LocalGrid, local_context
from fedgraft_simulations.partition import Share, partition
from fedgraft_simulations.sites import SimulatedSites
from fedgraft_simulations.throwaway_keys import kept_keys

SomeSite = TypeVar("SomeSite", bound=Site)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a plan promises, as a site's ledger accounts it.

    Attributes:
        epsilon: of the whole run; infinite without DP.
        delta: that goes with it.
        sample_rate: q.
        noise_multiplier: sigma; 0 without DP.
        steps: T.
        clipping_norm: C; 1 without DP, where it is only a unit of length.
    """

    epsilon: float
    delta: float
    sample_rate: float
    noise_multiplier: float
    steps: int
    clipping_norm: float


@dataclass(frozen=True, slots=True)
class Exchange:
    """One message to a site and what the site sent back.

    Attributes:
        site: number of the site, from 0.
        round: that was asked for.
        kind: Flower's message type: `train`, `evaluate`, or `query` for the final adapter.
        request: its adapter and plan are those of the round.
        sent: the reply in the bytes that leave the site.
    """

    site: int
    round: int
    kind: str
    request: Message
    sent: bytes

    @property
    def reply(self) -> Message:
        """The reply, read back from the bytes."""
        return message_from_proto(ProtoMessage.FromString(self.sent))


class RecordingGrid(LocalGrid):
    """A `LocalGrid` that writes down what crosses it."""

    def __init__(self, app: ClientApp, count: int, directory: Path) -> None:
        super().__init__(app, count)
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Delivers, and keeps request and reply."""
        requests = list(messages)
        ids = list(super().push_messages(requests))
        for request, name in zip(requests, ids, strict=True):
            site = request.metadata.dst_node_id - 1
            kind, number = request.metadata.message_type, read_request(request).round
            stem = f"{kind}-{number:06d}-{site:06d}"  # a kind may have a dot in it
            for suffix, message in ((".request.pb", request), (".pb", self._replies[name])):
                content = message_to_proto(message).SerializeToString()
                (self._directory / f"{stem}{suffix}").write_bytes(content)
        return ids


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A finished run.

    Attributes:
        plan: what ran.
        directory: where its files are.
        sites: the sites as they are after the run, in order; with their stores and records.
        shares: what each site holds; `shares[i].test` took no part in training.
        initial: the adapter before the first round.
        adapter: the released adapter after the last.
    """

    plan: Plan
    directory: Path
    sites: tuple[Site, ...]
    shares: tuple[Share, ...]
    initial: Tensors
    adapter: Tensors

    @classmethod
    def run(
        cls,
        plan: Plan,
        directory: Path,
        sites: Callable[[int], Site] | None = None,
        device: str = "cpu",
        on_round: Callable[[int], None] = lambda _: None,
    ) -> Rehearsal:
        """Runs a plan to its end.

        Args:
            plan: `aggregation.sites` is taken from `sites.count`.
            directory: for everything the run leaves; empty.
            sites: the site of each number, instead of the plan's own simulated sites; those with
                secure aggregation need a membership.
            device: where sites train.
            on_round: told the number of each finished round.

        Raises:
            FedgraftError: the plan, the data or the backbone is wrong, or a round failed.
        """
        logging.getLogger("flwr").setLevel(logging.ERROR)
        plan = plan.replace({"aggregation.sites": plan.sites.count})
        simulated = SimulatedSites(plan, directory / "sites", device)
        count = plan.sites.count
        every = [sites(i) for i in range(count)] if sites is not None else simulated.all()
        final: list[Tensors] = []

        def note(summary: RoundSummary) -> None:
            final[:] = [summary.adapter]
            on_round(summary.number)

        app = client_app(lambda context: every[int(context.node_config["partition-id"])])
        grid = RecordingGrid(app, count, directory / "replies")
        try:
            server = server_app(plan, directory / "server", note, False, simulated.trust)
            server(grid, local_context(0, 1))
        except MessageError as error:  # the sites are ours, so their own reason is shown
            own = (site.last_error for site in every)
            raise next((reason for reason in own if reason is not None), error) from None
        initial = every[0].bench(plan).initial
        shares = simulated.shares()
        return cls(plan, directory, tuple(every), tuple(shares), initial, final[0])

    def exchanges(self, kind: str = "*", number: int | None = None) -> Iterator[Exchange]:
        """Everything that crossed the grid, by kind, round and site; read from disk one by one.

        Args:
            kind: `train`, `evaluate` or `query` only.
            number: this round only.
        """
        rounds = "*" if number is None else f"{number:06d}"
        for file in sorted((self.directory / "replies").glob(f"{kind}-{rounds}-??????.pb")):
            found, asked, site = file.stem.split("-")
            wire = file.with_name(f"{file.stem}.request.pb").read_bytes()
            request = message_from_proto(ProtoMessage.FromString(wire))
            yield Exchange(int(site), int(asked), found, request, file.read_bytes())

    def updates(self, number: int) -> list[Tensors]:
        """What each site sent in a training round, in the order of sites: adapters (local, none)
        or noisy gradient sums (distributed).
        """
        schema = self.sites[0].bench(self.plan).adapted.schema
        return [
            from_record(exchange.reply.content.array_records[ADAPTER], schema)
            for exchange in self.exchanges("train", number)
        ]


def site_of(
    plan: Plan,
    directory: Path,
    number: int,
    runtime: Runtime,
    records: Records | None = None,
    config: SiteConfig | None = None,
    dataset: str = "data",
    kind: type[SomeSite] = Site,  # type: ignore[assignment]
) -> SomeSite:
    """A simulated site for `Rehearsal.run(plan, directory, ...)`, with something changed.

    Args:
        plan: the run.
        directory: of the run.
        number: of the site.
        runtime: device and warm models.
        records: what it trains on, instead of its share.
        config: what it says about itself, instead of what the plan does.
        dataset: its own name for its data.
        kind: of site.
    """
    shares = SimulatedSites(plan, directory / "sites").shares()
    share = shares[number]
    own = SiteConfig(
        share.name, share.classes, share.train.unit_count, simulated=True, task=share.spec
    )
    membership = None
    if plan.secure:
        names = [one.name for one in shares]
        keys, trust = kept_keys(directory / "sites" / "keys.json", names)
        membership = Membership(keys[share.name], lambda: trust)
    store = SiteStore(
        directory / "sites" / share.name, durable=False, dataset=dataset, unit=plan.privacy.unit
    )
    return kind(
        config or own, records or share.train, runtime, store, held_out=share.test,
        membership=membership,
    )  # fmt: skip


def claim_of(plan: Plan) -> Claim:
    """The promise of a plan at the simulated site where it costs most.

    Raises:
        PrivacyError: it cannot be met there.
    """
    plan = plan.replace({"aggregation.sites": plan.sites.count})
    steps = [step_noise(plan, share.train.unit_count, share.name) for share in partition(plan)]
    step: StepNoise = max(steps, key=lambda found: found.epsilon(plan.privacy.delta))
    return Claim(
        epsilon=step.epsilon(plan.privacy.delta),
        delta=plan.privacy.delta,
        sample_rate=step.sample_rate,
        noise_multiplier=step.event.noise_multiplier if step.event else 0.0,
        steps=plan.steps,
        clipping_norm=step.clipping_norm if math.isfinite(step.clipping_norm) else 1.0,
    )
