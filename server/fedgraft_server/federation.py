"""A federation run, seen from the server: rounds over a grid, a checkpoint after each.

The loop is ours because `Strategy.start` cannot begin in the middle, and because a reply is
checked against the plan's schema before any strategy sees it. The grid is whatever carries the
messages: in-process, Flower's simulation, or a SuperLink.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid, ServerApp

from fedgraft_common.adapted import adapted_backbone
from fedgraft_common.errors import FedgraftError, MessageError, PlanError
from fedgraft_common.files import write_atomically
from fedgraft_common.fixed_point import fixed_point
from fedgraft_common.messages import (
    ADAPTER,
    COUNTS,
    EVALUATE,
    FINAL,
    ROUND,
    STATUS,
    Counts,
    Status,
    Tensors,
    TensorSpec,
    clamp,
    digest,
    from_record,
    read_counts,
    read_status,
    to_record,
)
from fedgraft_common.plan import Plan
from fedgraft_common.secure_terms import to_tensors
from fedgraft_common.site_signature import Trust
from fedgraft_server.aggregation import Aggregator
from fedgraft_server.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from fedgraft_server.evaluation import Estimate, estimate
from fedgraft_server.secure_set_up import Registered
from fedgraft_server.secure_sum import SecureSum

log = logging.getLogger(__name__)
EVALUATIONS = "evaluations.json"
DELIVERY = 120.0  # seconds that the end of a run waits for sites to take the final adapter


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """What the server knows about a finished round.

    Attributes:
        number: from 1.
        adapter: the adapter after it.
        sites: updates that went in.
        bytes_received: size of those updates' tensors.
        evaluation: what the sites released after it, if the plan asks.
    """

    number: int
    adapter: Tensors
    sites: int
    bytes_received: int
    evaluation: Estimate | None = None


def run_federation(
    plan: Plan,
    grid: Grid,
    directory: Path,
    on_round: Callable[[RoundSummary], None] = lambda _: None,
    durable: bool = True,
    signature: str = "",
    backbone: Path | None = None,
    trust: Callable[[], Trust] | None = None,
    registered: Registered | None = None,
) -> Tensors:
    """Runs a plan to its last round, from its newest checkpoint if there is one.

    Args:
        plan: the run; `aggregation.sites` says how many sites take part.
        grid: carries the messages.
        directory: for checkpoints and the exported adapter.
        on_round: called after each finished round.
        durable: whether a checkpoint waits for the disk.
        signature: the operator's, on the plan; empty in a simulation.
        backbone: where the backbone lies, if not where the plan says.
        trust: whose certificates count in secure aggregation; needed where the plan has it.
        registered: which site and node a certificate belongs to; None in a simulation.

    Returns:
        The final adapter, which is also saved in PEFT's format under `directory/adapter`.

    Raises:
        MessageError: too few usable updates arrived in a round.
        AggregationError: several rounds in a row were lost.
        CheckpointError: the newest checkpoint is damaged or belongs to another plan.
    """
    model = adapted_backbone(plan, backbone)
    aggregator = Aggregator(plan, model.schema, signature, model.state())
    checkpoint = newest_checkpoint(directory, plan) or Checkpoint(0, model.state(), {})
    initial = model.state()
    aggregator.restore(checkpoint.strategy)
    adapter = checkpoint.adapter
    gather = _plain(plan, aggregator, grid)
    if plan.secure:
        gather = _secure(plan, aggregator, grid, directory, trust, durable, registered)
    if checkpoint.round not in evaluated_rounds(directory):  # cut short after the checkpoint
        evaluate(plan, aggregator, checkpoint.round, adapter, grid, directory)
    for number in range(checkpoint.round + 1, plan.rounds.count + 1):
        updates, sites, size = gather(number, adapter)
        if updates:
            adapter = clamp(aggregator.next_adapter(number, adapter, updates), initial)
        finished = Checkpoint(number, adapter, aggregator.state())
        save_checkpoint(directory, plan, finished, durable)
        found = evaluate(plan, aggregator, number, adapter, grid, directory)
        on_round(RoundSummary(number, adapter, sites, size, found))
    model.load(adapter)
    model.save(directory / "adapter")
    deliver(plan, aggregator, adapter, grid)
    return adapter


Gather = Callable[[int, Tensors], tuple[list[Tensors], int, int]]
"""Round and its start to updates, number of sites in them, bytes received. No updates: lost."""


def _plain(plan: Plan, aggregator: Aggregator, grid: Grid) -> Gather:
    """Every site's update, as it was sent."""

    def gather(number: int, adapter: Tensors) -> tuple[list[Tensors], int, int]:
        requests = aggregator.requests(number, adapter, grid)
        replies = grid.send_and_receive(requests, timeout=plan.rounds.deadline)
        updates = usable_updates(plan, aggregator.schema, number, list(replies))
        size = sum(tensor.nbytes for update in updates for tensor in update.values())
        return updates, len(updates), size

    return gather


def _secure(
    plan: Plan,
    aggregator: Aggregator,
    grid: Grid,
    directory: Path,
    trust: Callable[[], Trust] | None,
    durable: bool,
    registered: Registered | None,
) -> Gather:
    """One update: the sum over the sites, which is all there is to see."""
    if trust is None:
        raise PlanError(
            "privacy.secure_aggregation", plan.privacy.secure_aggregation,
            "summed, where no certificates are at hand",
            "Run it on a federation's server, or in a simulation.",
        )  # fmt: skip
    schema = aggregator.schema
    field = fixed_point(plan, sum(math.prod(spec.shape) for spec in schema))
    sums = SecureSum(plan, aggregator, grid, directory, field.bits, trust, durable, registered)

    def gather(number: int, adapter: Tensors) -> tuple[list[Tensors], int, int]:
        total = sums.gather(number, adapter)
        if total is None:
            return [], 0, 0
        update = to_tensors(field.decode(total.values), schema)
        return [update], len(total.survivors), len(total.survivors) * total.values.nbytes

    return gather


def deliver(plan: Plan, aggregator: Aggregator, adapter: Tensors, grid: Grid) -> int:
    """Sends the final adapter to the sites, for their refit at home; returns how many have it.

    A site that is away gets it when the finished run is resumed, or from the exported adapter.
    """
    requests = aggregator.requests(plan.rounds.count, adapter, grid)
    for request in requests:
        request.metadata.message_type = FINAL
    replies = list(grid.send_and_receive(requests, timeout=min(DELIVERY, plan.rounds.deadline)))
    kept = sum(read_status(reply) is Status.KEPT for reply in replies)
    facts = {"action": "deliver", "round": plan.rounds.count}
    log.info("%d of %d sites have the final adapter", kept, len(requests), extra=facts)
    return kept


def evaluate(
    plan: Plan, aggregator: Aggregator, number: int, adapter: Tensors, grid: Grid, directory: Path
) -> Estimate | None:
    """Asks for noised counts after a round that the plan evaluates, and keeps what they say.

    Late sites are left out.
    """
    if not plan.evaluates(number):
        return None
    requests = aggregator.requests(number, adapter, grid)
    for request in requests:
        request.metadata.message_type = EVALUATE
    counts: dict[int, Counts] = {}
    for reply in grid.send_and_receive(requests, timeout=plan.rounds.deadline):
        node = reply.metadata.src_node_id
        facts = {"action": "refuse", "round": number, "site": node}
        if read_status(reply) is not Status.OK:
            log.warning("no evaluation: %s", read_status(reply), extra=facts)
            continue
        if reply.content.config_records[STATUS].get(ROUND) != number:
            log.warning("a late answer was ignored", extra=facts)
            continue
        try:
            found = read_counts(reply.content.metric_records.get(COUNTS))
            counts.setdefault(node, found)  # a second answer is ignored
        except MessageError as error:
            log.warning("%s", error, extra=facts)
    result = estimate(number, list(counts.values()), plan.evaluation.noise_multiplier)
    log.info(
        "round %d: accuracy %.3f, 95 %% interval %.3f to %.3f, from noised counts of %d sites",
        number, result.accuracy, result.low, result.high, result.sites,
        extra={"action": "evaluate", "round": number},
    )  # fmt: skip
    keep_evaluation(directory, result)
    return result


def evaluated_rounds(directory: Path) -> set[int]:
    """The rounds whose evaluation was kept."""
    return {int(str(item["round"])) for item in _evaluations(directory)}


def keep_evaluation(directory: Path, found: Estimate) -> None:
    """Adds a released evaluation to `evaluations.json`; one per round, the first that came."""
    known = _evaluations(directory)
    if found.round not in {item["round"] for item in known}:
        accuracy = found.accuracy if math.isfinite(found.accuracy) else None
        known.append({**asdict(found), "accuracy": accuracy})
        write_atomically(directory / EVALUATIONS, (json.dumps(known, indent=2) + "\n").encode())


def _evaluations(directory: Path) -> list[dict[str, object]]:
    file = directory / EVALUATIONS
    known: list[dict[str, object]] = json.loads(file.read_text()) if file.exists() else []
    return known


def usable_updates(
    plan: Plan, schema: tuple[TensorSpec, ...], number: int, replies: list[Message]
) -> list[Tensors]:
    """The updates of a round, in an order that depends on their bytes alone.

    Floating-point sums depend on the order, and node ids are drawn at random: so the same updates
    give the same adapter, bit for bit, whoever carried them.

    Raises:
        MessageError: fewer than the plan asks for; nothing is aggregated then.
    """
    updates: dict[int, Tensors] = {}
    refused: list[str] = []
    for reply in sorted(replies, key=lambda r: r.metadata.src_node_id):
        node = reply.metadata.src_node_id
        try:
            updates.setdefault(node, _update(schema, number, reply))  # a second answer is ignored
        except FedgraftError as error:
            facts = {"action": "refuse", "round": number, "site": node}
            log.warning("%s", error, extra=facts)
            refused.append(str(error.value))
    needed = plan.aggregation.minimum_sites
    if plan.privacy.mechanism == "distributed":  # a colluder's share is known: it hides nothing
        needed = max(needed, plan.noise_shares + plan.privacy.tolerated_colluders)
    if len(updates) < needed:
        raise MessageError(
            f"round {number}", f"{len(updates)} usable updates, {len(refused)} without one "
            f"({', '.join(sorted(set(refused))) or 'none'})", f"at least {needed}",
            "Look into the sites' own logs; then resume, or lower aggregation.minimum_sites.",
        )  # fmt: skip
    return sorted(updates.values(), key=lambda update: digest(to_record(update)))


def _update(schema: tuple[TensorSpec, ...], number: int, reply: Message) -> Tensors:
    status = read_status(reply)
    if status is not Status.OK:
        raise MessageError("status", status.value, "ok", "See the site's log.")
    answered = reply.content.config_records[STATUS].get("round")
    if answered != number:
        raise MessageError("round", answered, str(number), "A late reply was ignored.")
    return from_record(reply.content.array_records.get(ADAPTER, ArrayRecord()), schema)


def server_app(
    plan: Plan,
    directory: Path,
    on_round: Callable[[RoundSummary], None] = lambda _: None,
    durable: bool = True,
    trust: Callable[[], Trust] | None = None,
) -> ServerApp:
    """The run as a Flower ServerApp."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_federation(plan, grid, directory, on_round, durable, trust=trust)

    return app
