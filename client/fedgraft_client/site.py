"""A site: its records, its head, and its answer to a round's request.

The way a request takes:

    Message -> plan, policy, adapter checked -> ledger.reserve -> DP training -> ledger.commit
            -> egress guard -> Message

Nothing that goes wrong on the way leaves the site: the reply then says one word of a closed list
(`Status`), and the reason is in the site's own log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Message

from fedgraft_client.budget import Cost, affordable_rounds, check_affordable, cost
from fedgraft_client.cache import keep
from fedgraft_client.data import Records, check_records
from fedgraft_client.egress import digest_counts, guard, guard_counts
from fedgraft_client.entry import Charge, Purpose, evaluation_of
from fedgraft_client.evaluation import exact_counts, noised
from fedgraft_client.head import LinearHead, initial_head
from fedgraft_client.policy import Policy, check_hours, check_plan
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.refit import refit_head
from fedgraft_client.runtime import BENCHES, Runtime, Workbench
from fedgraft_client.store import SiteStore
from fedgraft_client.training import train_round
from fedgraft_client.units import unit_index
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.errors import (
    ApprovalError,
    BudgetError,
    FedgraftError,
    MessageError,
    PlanError,
    PolicyError,
    PrivacyError,
    SealedError,
)
from fedgraft_common.mechanism import StepNoise, step_noise
from fedgraft_common.messages import (
    Counts,
    Request,
    Status,
    Tensors,
    check_range,
    from_record,
    read_request,
    status_of,
    to_record,
    write_counts,
    write_reply,
)
from fedgraft_common.plan import Plan, parse_plan
from fedgraft_common.signing import check_signature

log = logging.getLogger(__name__)
REMEMBERED = 32  # plans whose check and calibration are kept; more are worked out again


@dataclass(frozen=True, slots=True)
class SiteConfig:
    """What a site says about itself.

    Attributes:
        name: how the operator calls it; stays at the site.
        classes: names of its classes, from its own label map or the plan, never from its data.
        nominal_size: the number of units it declares in public; q = B / nominal_size.
        simulated: draw reproducible noise from the plan's seed. No privacy; refused by a daemon.
    """

    name: str
    classes: tuple[str, ...]
    nominal_size: int
    simulated: bool = False


class Site:
    """One data owner.

    Args:
        config: what it says about itself.
        records: its training records.
        runtime: device and warm models, shared by all sites in the process.
        store: where its ledger, head and replies are kept.
        policy: its own rules; a simulated site has none.
        clock: local time.
        held_out: records of other units, counted by released evaluations.
        operator_key: the federation operator's; a plan without their signature is then refused.

    Raises:
        DataError: the records cannot be used.
    """

    def __init__(
        self,
        config: SiteConfig,
        records: Records,
        runtime: Runtime,
        store: SiteStore,
        policy: Policy | None = None,
        clock: Callable[[], datetime] = datetime.now,
        held_out: Records | None = None,
        operator_key: Ed25519PublicKey | None = None,
    ) -> None:
        check_records(records, config.classes, config.name)
        self.config = config
        if held_out is not None:
            check_records(held_out, config.classes, f"{config.name}, held out")
        self.records = records
        self.held_out = held_out
        self.operator_key = operator_key
        self.runtime = runtime
        self.store = store
        self.policy = Policy() if policy is None and not config.simulated else policy
        self.last_error: Exception | None = None
        self._clock = clock
        self._caches: dict[int, tuple[Workbench, Cached]] = {}
        self._held_out_cache: tuple[Workbench, Cached] | None = None
        self._runs: dict[int, str] = {}
        self._plans: dict[str, tuple[Plan, StepNoise]] = {}

    def answer(self, message: Message) -> Message:
        """The reply to one round's request: adapter, round, status."""

        def work(request: Request, plan: Plan, step: StepNoise) -> Message:
            bench = self.runtime.workbench(plan)
            adapter = self._adapter(request, bench)
            update = to_record(self._round(bench, plan, step, request.round, adapter))
            reply = write_reply(message, request.round, Status.OK, update)
            committed = self._committed(plan.hash, request.round)
            return guard(reply, message, request.round, bench.adapted.schema, committed)

        def refuse(number: int, status: Status) -> Message:
            return guard(write_reply(message, number, status), message, number)

        return self._contain(message, work, refuse)

    def evaluate(self, message: Message) -> Message:
        """The reply to a request for an evaluation: two noised counts, round, status."""

        def work(request: Request, plan: Plan, step: StepNoise) -> Message:
            bench = self.runtime.workbench(plan)
            adapter = self._adapter(request, bench)
            counts = self._counts(bench, plan, step, request.round, adapter)
            reply = write_counts(message, request.round, Status.OK, counts)
            committed = self._committed(evaluation_of(plan.hash), request.round)
            return guard_counts(reply, message, request.round, committed)

        def refuse(number: int, status: Status) -> Message:
            return guard_counts(write_counts(message, number, status), message, number)

        return self._contain(message, work, refuse)

    def keep_final(self, message: Message) -> Message:
        """The reply to the run's last message: the final adapter is kept for the refit."""

        def work(request: Request, plan: Plan, step: StepNoise) -> Message:
            bench = self.runtime.workbench(plan)
            adapter = self._adapter(request, bench)
            self.store.save_final(plan, adapter)
            return refuse(request.round, Status.KEPT)

        def refuse(number: int, status: Status) -> Message:
            return guard(write_reply(message, number, status), message, number)

        return self._contain(message, work, refuse)

    def _adapter(self, request: Request, bench: Workbench) -> Tensors:
        """What the server sent, if the plan and common sense allow it."""
        adapter = from_record(request.adapter, bench.adapted.schema)
        check_range(adapter, bench.initial)
        return adapter

    def _contain(
        self,
        message: Message,
        work: Callable[[Request, Plan, StepNoise], Message],
        refuse: Callable[[int, Status], Message],
    ) -> Message:
        """Turns whatever goes wrong into one word; Flower would send an exception's text."""
        self.last_error = None
        number, plan = 0, None
        try:
            request = read_request(message)
            number = request.round
            plan, step = self._accept(request, message.metadata.run_id)
            return work(request, plan, step)
        except FedgraftError as error:
            self.last_error, status = error, status_of(error)
            if plan is not None and status is Status.BUDGET and self._took_part(plan):
                status = Status.RETIRED
        except Exception as error:
            self.last_error, status = error, Status.FAILED
            log.debug("site %s, round %d", self.config.name, number, exc_info=True)
        log.warning("site %s, round %d: %s: %s", self.config.name, number, status, self.last_error)
        return refuse(number, status)

    def _committed(self, output: str, number: int) -> str | None:
        """SHA-256 of what the ledger lets out for a round."""
        finished = self.store.ledger.finished(output)
        return finished.digest if finished and finished.round == number else None

    def _took_part(self, plan: Plan) -> bool:
        return bool(self.store.ledger.spent(plan.hash))

    def _accept(self, request: Request, run: int) -> tuple[Plan, StepNoise]:
        """Checks a plan, and once what it would cost here; signature, clock and seal every time."""
        text = request.plan
        if self.operator_key is not None:
            check_signature(text, request.signature, self.operator_key)
        if text not in self._plans:
            try:
                document = json.loads(text)
            except ValueError:
                raise MessageError(
                    "plan", "not JSON", "a plan as canonical JSON", "The message was ignored."
                ) from None
            plan = parse_plan(document, origin="request")
            if text != plan.canonical:
                raise MessageError(
                    "plan", "JSON in another form", "a plan as canonical JSON",
                    "The message was ignored.",
                )  # fmt: skip
            while len(self._plans) >= REMEMBERED:
                self._plans.pop(next(iter(self._plans)))
            self._plans[text] = plan, self.agree(plan)
        plan, step = self._plans[text]
        while len(self._runs) >= 1000:
            self._runs.pop(next(iter(self._runs)))
        if not self.config.simulated and self._runs.setdefault(run, plan.hash) != plan.hash:
            raise PlanError(
                f"run {run}: plan", plan.hash[:12], f"{self._runs[run][:12]}, as it began",
                "A running plan is never changed; start a new run.",
            )  # fmt: skip
        if self.store.ledger.sealed(plan.hash):
            raise SealedError(
                f"run {plan.name}", "sealed", "a run whose head was not refitted at home",
                "A head fitted without noise never takes part again; start a new run.",
            )  # fmt: skip
        if self.policy is not None:
            check_hours(self.policy, self._clock())
        return plan, step

    def agree(self, plan: Plan) -> StepNoise:
        """Holds a plan against policy, approval and budget, before its first round here.

        Returns:
            What a step of it uses.

        Raises:
            PrivacyError: it cannot be met here.
            PolicyError: the site's own rules do not allow it, or it costs too much.
        """
        if plan.privacy.mechanism != "local" and not self.config.simulated:
            raise PrivacyError(
                "privacy.mechanism", plan.privacy.mechanism, "local, at a site with real data",
                "Without secure aggregation the server would see this site's own sum with "
                "little noise or none; simulate the plan instead.",
            )  # fmt: skip
        step = self.step(plan)
        if self.policy is None:
            return step
        key = self.operator_key
        signer = None if key is None else key.public_bytes_raw().hex()
        check_plan(self.policy, plan, self.store.ledger.unit, step, signer)
        if self.policy.approval == "manual" and not self.store.approved(plan):
            raise ApprovalError(
                f"plan {plan.name}", plan.hash[:12], "a plan the operator has approved",
                "Look at it with `fedgraft site plans`, then "
                f"`fedgraft site approve {plan.hash[:12]}`.",
            )  # fmt: skip
        if not self._took_part(plan):
            self._check_whole(plan, step)
        return step

    def _check_whole(self, plan: Plan, step: StepNoise) -> None:
        """Knows the last affordable round before the first one starts."""
        assert self.policy is not None and step.event is not None  # noqa: S101 - see agree
        ledger = self.store.ledger
        rounds = affordable_rounds(
            self.policy, plan, step.events, ledger.spent(), ledger.spent(plan.hash)
        )
        if rounds == plan.rounds.count:
            return
        if rounds == 0 or not self.policy.partial_runs:
            raise BudgetError(
                f"plan {plan.name}", f"{plan.rounds.count} rounds",
                f"{rounds}, what the budget pays (policy.maximum_epsilon "
                f"{self.policy.maximum_epsilon:g}, policy.partial_runs "
                f"{str(self.policy.partial_runs).lower()})",
                "Nothing was spent. Ask for a plan that costs less, or allow partial runs.",
            )  # fmt: skip
        log.warning(
            "site %s: the budget pays %d of %d rounds of %s; the site leaves after that",
            self.config.name, rounds, plan.rounds.count, plan.name,
        )  # fmt: skip

    def cost(self, plan: Plan) -> Cost:
        """What joining a run would cost this data set."""
        step = self.step(plan)
        assert step.event is not None  # noqa: S101 - a policy refuses plans without noise
        return cost(self.policy or Policy(), plan, step.events, self.store.ledger.spent())

    def step(self, plan: Plan) -> StepNoise:
        """Sample rate and noise of this site under a plan.

        Raises:
            PrivacyError: the plan cannot be met here.
        """
        unit_index(plan, self.records.units, self.config.name)  # refuses a column it lacks
        return step_noise(plan, self.config.nominal_size, self.config.name)

    def _round(
        self, bench: Workbench, plan: Plan, step: StepNoise, number: int, adapter: Tensors
    ) -> Tensors:
        head = initial_head(plan, self.config.classes, bench.adapted.feature_dim)
        finished, update = self.store.last_round(plan, head)
        if number == finished:
            return update  # the request came again: the same bytes, no second look at the data
        if number < finished or number > plan.rounds.count:
            raise MessageError(
                "round", number, f"{finished} (again) to {plan.rounds.count}",
                "The server is behind this site: let it resume from its newest checkpoint.",
            )  # fmt: skip
        if number == 1 and any(not torch.equal(adapter[n], t) for n, t in bench.initial.items()):
            raise MessageError(
                "adapter", "another start", "the initial adapter that the plan's seed gives",
                "Server and site run different versions, or the server is not honest.",
            )  # fmt: skip
        noise = self._noise("round", plan, number)
        cached, labels = self.cached(bench), self.records.labels
        bench.trainer(head)  # checks the gradients on synthetic records before anything is spent
        reservation = None
        if step.event is not None:  # without DP, in a simulation, there is nothing to account
            event = replace(step.event, steps=plan.training.local_steps)
            reservation = self._reserve(plan, event, number, "train")
        try:
            update = train_round(
                bench, plan, number, adapter, head, cached, labels, step, noise,
                self.runtime.physical_batch, self.records.units, self.runtime.remember,
            )  # fmt: skip
        except BaseException:
            if reservation is not None and noise.untouched:  # no batch was ever drawn
                self.store.ledger.void(reservation)
            raise
        self.store.save_round(plan, number, head, update, reservation)
        return update

    def _counts(
        self, bench: Workbench, plan: Plan, step: StepNoise, number: int, adapter: Tensors
    ) -> Counts:
        finished = self.store.ledger.finished(evaluation_of(plan.hash))
        if finished is not None and finished.round == number:
            return Counts(**json.loads(finished.content))  # asked again: the same numbers
        if not plan.evaluates(number) or (finished is not None and number < finished.round):
            raise MessageError(
                "round", number, f"a round that the plan evaluates (every {plan.evaluation.every})",
                "The server does not follow its own plan, or is behind this site.",
            )  # fmt: skip
        if self.held_out is None or step.evaluation is None:
            raise PolicyError(
                "data.held_out", "nothing", "records held out for a released evaluation",
                "Name a file with records of other units in the site file, or ask for a plan "
                "without evaluation.",
            )  # fmt: skip
        cached = self.cached_held_out(bench)
        noise = self._noise("evaluate", plan, number)
        reservation = self._reserve(plan, replace(step.evaluation, steps=1), number, "evaluate")
        features = bench.features(adapter, cached)
        exact = exact_counts(features, self.trained_head(plan), self.held_out)
        counts = noised(exact, step.evaluation.noise_multiplier, noise)
        content = json.dumps({"correct": counts.correct, "total": counts.total}).encode()
        self.store.ledger.commit(
            reservation, evaluation_of(plan.hash), number, digest_counts(counts), content
        )
        return counts

    def _noise(self, purpose: str, plan: Plan, number: int) -> NoiseSource:
        if self.config.simulated:
            return NoiseSource.for_simulation(purpose, plan.hash, self.config.name, number)
        return NoiseSource.from_operating_system()

    def _reserve(self, plan: Plan, event: SamplingEvent, number: int, purpose: Purpose) -> int:
        """Charges what is about to look at the data, if the budget pays it."""
        ledger = self.store.ledger
        if self.policy is not None:
            spent, run = ledger.spent(), ledger.spent(plan.hash)
            check_affordable(self.policy, plan.privacy.delta, event, spent, run)
        distributed = plan.privacy.mechanism == "distributed" and purpose == "train"
        return ledger.reserve(
            Charge(
                run=plan.name,
                plan=plan.hash,
                round=number,
                purpose=purpose,
                mechanism=plan.privacy.mechanism if distributed else "local",
                unit=plan.privacy.unit,
                event=event,
                shares=plan.noise_shares if distributed else 1,
                colluders=plan.privacy.tolerated_colluders if distributed else 0,
            )
        )

    def cached(self, bench: Workbench) -> Cached:
        """What the frozen prefix makes of the training records; computed once."""
        key = id(bench)
        if key not in self._caches:
            while len(self._caches) >= BENCHES:
                self._caches.pop(next(iter(self._caches)))
            kept = keep(bench.cache(self.records.images), self.store.directory)
            self._caches[key] = (bench, kept)
        return self._caches[key][1]

    def cached_held_out(self, bench: Workbench) -> Cached:
        """The same of the records held out, kept in memory."""
        assert self.held_out is not None  # noqa: S101 - asked for where there are some
        if self._held_out_cache is None or self._held_out_cache[0] is not bench:
            self._held_out_cache = bench, bench.cache(self.held_out.images)
        return self._held_out_cache[1]

    def trained_head(self, plan: Plan) -> LinearHead:
        """The head as the federation left it: DP-trained, or the fixed prototype."""
        bench = self.runtime.workbench(plan)
        head = initial_head(plan, self.config.classes, bench.adapted.feature_dim)
        self.store.last_round(plan, head)
        return head

    def refit(self, plan: Plan, adapter: Tensors) -> LinearHead:
        """Fits the head to this adapter without noise and seals it. See `refit_head`."""
        bench = self.runtime.workbench(plan)
        features = bench.features(adapter, self.cached(bench))
        head = refit_head(features, self.records.labels, self.trained_head(plan))
        self.store.seal(plan, head, self.config.classes)
        return head
