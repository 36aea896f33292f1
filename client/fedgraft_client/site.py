"""A site: its records, its head, its answer to a round. Long: all that it ever does is in one file.

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
from safetensors.torch import load, save

from fedgraft_client.augmentation import check_views, views
from fedgraft_client.budget import Cost, affordable_rounds, check_affordable, cost
from fedgraft_client.cache import keep
from fedgraft_client.data import Records, check_records
from fedgraft_client.egress import digest_counts, guard, guard_counts, guard_secure
from fedgraft_client.entry import Charge, Purpose, evaluation_of, start_of
from fedgraft_client.evaluation import exact_counts, noised
from fedgraft_client.few_shot import class_sums, noisy_prototypes
from fedgraft_client.head import LinearHead
from fedgraft_client.peers import Peers
from fedgraft_client.policy import Policy, check_hours, check_plan
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.refit import refit_head
from fedgraft_client.runtime import BENCHES, Runtime, Workbench
from fedgraft_client.secure_member import Membership, SecureMember
from fedgraft_client.store import SiteStore
from fedgraft_client.task_head import start_head
from fedgraft_client.tasks import Task, build_task
from fedgraft_client.tasks.alignment import aligned
from fedgraft_client.tasks.task import no_count
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
    SecureStep,
    Status,
    Tensors,
    check_range,
    digest,
    from_record,
    read_request,
    status_of,
    to_record,
    write_counts,
    write_reply,
    write_secure,
)
from fedgraft_common.plan import Plan, parse_plan
from fedgraft_common.secure_terms import context_of, masked_schema, to_tensors, to_vector
from fedgraft_common.signing import check_signature
from fedgraft_common.task_spec import TaskSpec

log = logging.getLogger(__name__)
REMEMBERED = 32  # plans whose check and calibration are kept; more are worked out again


@dataclass(frozen=True, slots=True)
class SiteConfig:
    """What a site says about itself.

    Attributes:
        name: how the operator calls it; stays at the site.
        classes: names of its classes, from its own label map or the plan, never from its data.
            Empty if the task has none.
        nominal_size: the number of units it declares in public; q = B / nominal_size.
        simulated: draw reproducible noise from the plan's seed. No privacy; refused by a daemon.
        task: what it predicts; None: which of the classes.
    """

    name: str
    classes: tuple[str, ...]
    nominal_size: int
    simulated: bool = False
    task: TaskSpec | None = None

    @property
    def spec(self) -> TaskSpec:
        """What the site predicts."""
        return self.task or TaskSpec(classes=self.classes)


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
        membership: key and trust for secure aggregation; without it such plans are refused.

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
        membership: Membership | None = None,
    ) -> None:
        task = build_task(config.spec, where=f"site {config.name}")
        check_records(records, task, config.name)
        self.config = config
        if held_out is not None:
            check_records(held_out, task, f"{config.name}, held out")
        self.records = records
        self.held_out = held_out
        self.operator_key = operator_key
        self.membership = membership
        self.runtime = runtime
        self.store = store
        self.policy = Policy() if policy is None and not config.simulated else policy
        self.last_error: Exception | None = None
        self._clock = clock
        self._caches: dict[tuple[int, str], tuple[Workbench, Cached]] = {}
        self._labels: dict[int, tuple[Workbench, torch.Tensor]] = {}
        self._held_out_cache: tuple[Workbench, Cached] | None = None
        self._runs: dict[int, str] = {}
        self._plans: dict[str, tuple[Plan, StepNoise]] = {}
        self._members: dict[str, SecureMember] = {}

    def answer(self, message: Message) -> Message:
        """The reply to one round's request: adapter, round, status."""

        def work(request: Request, plan: Plan, step: StepNoise) -> Message:
            bench = self.bench(plan)
            update = to_record(self._round(bench, plan, step, request))
            reply = write_reply(message, request.round, Status.OK, update)
            committed = self._committed(plan.hash, request.round)
            schema = bench.adapted.schema
            if plan.secure:
                schema = masked_schema(schema, bench.fixed_point(plan).bits)
            return guard(reply, message, request.round, schema, committed)

        def refuse(number: int, status: Status) -> Message:
            return guard(write_reply(message, number, status), message, number)

        return self._contain(message, work, refuse)

    def evaluate(self, message: Message) -> Message:
        """The reply to a request for an evaluation: two noised counts, round, status."""

        def work(request: Request, plan: Plan, step: StepNoise) -> Message:
            bench = self.bench(plan)
            adapter = self._adapter(request, bench)
            counts = self._counts(bench, plan, step, request.round, adapter)
            reply = write_counts(message, request.round, Status.OK, counts)
            committed = self._committed(evaluation_of(plan.hash), request.round)
            return guard_counts(reply, message, request.round, committed)

        def refuse(number: int, status: Status) -> Message:
            return guard_counts(write_counts(message, number, status), message, number)

        return self._contain(message, work, refuse)

    def secure(self, kind: SecureStep, message: Message) -> Message:
        """The reply to a step of secure aggregation beside a round: its message, round, status."""

        def work(request: Request, plan: Plan, step: StepNoise) -> Message:
            member = self._member(plan, self.bench(plan))
            answer = member.answer(kind, request.round, request.secure)
            reply = write_secure(message, request.round, Status.OK, answer)
            return guard_secure(reply, message, request.round, member.may_leave)

        def refuse(number: int, status: Status) -> Message:
            return guard_secure(write_secure(message, number, status), message, number)

        return self._contain(message, work, refuse)

    def keep_final(self, message: Message) -> Message:
        """The reply to the run's last message: the final adapter is kept for the refit."""

        def work(request: Request, plan: Plan, step: StepNoise) -> Message:
            bench = self.bench(plan)
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
        facts = {"action": "refuse", "round": number or None, "site": self.config.name}
        log.warning("%s: %s", status, self.last_error, extra=facts)
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
        if plan.privacy.mechanism == "none" and not self.config.simulated:
            raise PrivacyError(
                "privacy.mechanism", "none", "local or distributed, at a site with real data",
                "Only a simulation runs without DP.",
            )  # fmt: skip
        if plan.privacy.mechanism == "distributed" and not (plan.secure or self.config.simulated):
            raise PrivacyError(
                "privacy.secure_aggregation", plan.privacy.secure_aggregation,
                "real, at a site with real data",
                "The server would see this site's own sum with little noise; simulate the plan "
                "instead.",
            )  # fmt: skip
        step = self.step(plan)
        task = self.task(plan)
        if plan.evaluations and not task.countable:
            raise no_count(task, "its answers are not right or wrong record by record")
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
        if self.policy.approval == "automatic":
            self.store.ledger.approve(plan.hash, plan.name, by="policy")
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
            "the budget pays %d of %d rounds of %s; the site leaves after that",
            rounds, plan.rounds.count, plan.name,
            extra={"action": "budget", "site": self.config.name},
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

    def _member(self, plan: Plan, bench: Workbench) -> SecureMember:
        """This site in the plan's secure aggregation.

        Raises:
            MessageError: the plan has none.
            PrivacyError: this site has no certificate.
        """
        if not plan.secure:
            raise MessageError(
                "request", "a step of secure aggregation", "none: the plan has no such mechanism",
                "The server does not follow its own plan.",
            )  # fmt: skip
        if self.membership is None:
            raise PrivacyError(
                "privacy.secure_aggregation", "real", "summed, at a site without a certificate",
                "Join a federation first: the certificate signs the site's keys.",
            )  # fmt: skip
        if plan.hash not in self._members:
            while len(self._members) >= BENCHES:
                self._members.pop(next(iter(self._members)))
            field = bench.fixed_point(plan)
            self._members[plan.hash] = SecureMember(
                plan, field.length, field.bits, self.store.ledger, self.membership, self._peers()
            )
        return self._members[plan.hash]

    def _peers(self) -> Peers:
        rule = None if self.policy is None else self.policy.peers
        return Peers(self.store.ledger, self.store.directory / "peers", rule)

    def _round(self, bench: Workbench, plan: Plan, step: StepNoise, request: Request) -> Tensors:
        number, adapter = request.round, self._adapter(request, bench)
        head = self.start_head(plan)
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
        member = self._member(plan, bench) if plan.secure else None
        if member is not None and request.secure:
            member.accept(number, request.secure)
        if member is not None:
            member.check(number)
        noise = self._noise("round", plan, number)
        cached, labels = self.cached(bench, plan), self.labels(bench)
        # checks the gradients on synthetic records before anything is spent
        bench.trainer(head, plan.training.dropout, plan.training.alignment)
        if finished == 0 and plan.head.training == "prototype":
            self._start_with_means(bench, plan, step, number, head)
        reservation = None
        if step.event is not None:  # without DP, in a simulation, there is nothing to account
            event = replace(step.event, steps=plan.training.local_steps)
            reservation = self._reserve(plan, event, number, "train")
        try:
            update = train_round(
                bench, plan, number, adapter, head, cached, labels, step, noise,
                self.runtime.physical_batch, self.records.units, self.runtime.remember,
                plan.augmentation.views,
            )  # fmt: skip
        except BaseException:
            if reservation is not None and noise.untouched:  # no batch was ever drawn
                self.store.ledger.void(reservation)
            raise
        state = None
        if member is not None:
            schema, context = bench.adapted.schema, context_of(plan, number, request.adapter)
            values = bench.fixed_point(plan).encode(to_vector(update, schema), noise)
            masked, state = member.mask(number, values, context)
            update = to_tensors(masked, schema)
        self.store.save_round(plan, number, head, update, reservation, state)
        return update

    def _start_with_means(
        self, bench: Workbench, plan: Plan, step: StepNoise, number: int, head: LinearHead
    ) -> None:
        """Sets a head to the site's own class means, which are released once in a run."""
        ledger, output = self.store.ledger, start_of(plan.hash)
        kept = ledger.finished(output)
        if kept is None:
            noise = self._noise("start", plan, number)
            sigma = step.start.noise_multiplier if step.start else 0.0
            units = None if plan.privacy.unit == "record" else self.records.units
            charged = step.start and self._reserve(plan, step.start, number, "start")
            try:
                features = bench.features(bench.initial, self.cached(bench))
                sums = class_sums(features, self.labels(bench), head.linear.out_features, units)
                rows = {"rows": noisy_prototypes(sums, sigma, noise)}
            except BaseException:
                if charged and noise.untouched:  # nothing was released
                    self.store.ledger.void(charged)
                raise
            seal, content = digest(to_record(rows)), save(rows)
            if charged:
                ledger.commit(charged, output, number, seal, content)
            else:
                ledger.keep(output, number, seal, content)
        else:
            rows = load(kept.content)
        with torch.no_grad():
            head.linear.weight.copy_(rows["rows"] * plan.head.scale)

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
        if self._held_out_cache is None or self._held_out_cache[0] is not bench:
            self._held_out_cache = bench, bench.cache(self.held_out.inputs)
        noise = self._noise("evaluate", plan, number)
        reservation = self._reserve(plan, replace(step.evaluation, steps=1), number, "evaluate")
        features = bench.features(adapter, self._held_out_cache[1])
        labels = aligned(self.task(plan), self.held_out, bench.adapted.backbone)
        held_out = replace(self.held_out, labels=labels)
        exact = exact_counts(features, self.trained_head(plan), held_out)
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

    def cached(self, bench: Workbench, plan: Plan | None = None) -> Cached:
        """What the frozen prefix makes of the training records; computed once.

        Args:
            bench: the model.
            plan: whose views of each record are wanted, next to each other; None: the records.
        """
        settings = plan.augmentation if plan and plan.augmentation.views > 1 else None
        key = (id(bench), settings.model_dump_json() + str(plan.seed) if plan and settings else "")
        if key not in self._caches:
            while len(self._caches) >= BENCHES:
                self._caches.pop(next(iter(self._caches)))
            raw = self.records.inputs
            if plan and settings:
                task, modality = self.task(plan), bench.adapted.backbone.modality
                check_views(settings, modality, task.features, task.spec.kind)
                raw = views(raw, settings, plan.seed, modality)
            kept = keep(bench.cache(raw), self.store.directory)
            self._caches[key] = (bench, kept)
        return self._caches[key][1]

    def labels(self, bench: Workbench) -> torch.Tensor:
        """The labels of the training records, one for each place that this model has."""
        key = id(bench)
        if key not in self._labels:
            while len(self._labels) >= BENCHES:
                self._labels.pop(next(iter(self._labels)))
            found = aligned(build_task(self.config.spec), self.records, bench.adapted.backbone)
            self._labels[key] = (bench, found)
        return self._labels[key][1]

    def task(self, plan: Plan) -> Task:
        """What the site predicts, with the plan's weights of classes."""
        return build_task(self.config.spec, plan.training.class_weights)

    def bench(self, plan: Plan) -> Workbench:
        """The plan's model, giving the features that this site's head takes."""
        return self.runtime.workbench(plan, self.task(plan).features)

    def start_head(self, plan: Plan) -> LinearHead:
        """The head that a run starts with here."""
        return start_head(plan, self.task(plan), self.bench(plan).adapted)

    def trained_head(self, plan: Plan) -> LinearHead:
        """The head as the federation left it: DP-trained, or the fixed prototype."""
        head = self.start_head(plan)
        self.store.last_round(plan, head)
        return head

    def refit(self, plan: Plan, adapter: Tensors) -> LinearHead:
        """Fits the head to this adapter without noise and seals it. See `refit_head`."""
        bench = self.bench(plan)
        features = bench.features(adapter, self.cached(bench))
        head = refit_head(features, self.labels(bench), self.trained_head(plan))
        self.store.seal(plan, head)
        return head
