"""A site: its records, its head, and its answer to a round's request.

The way a request takes:

    Message -> plan and adapter checked -> noise calibrated -> DP training -> stored -> Message

Nothing that goes wrong on the way leaves the site: the reply then says `refused` or `failed`, and
the reason is in the site's own log.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import torch
from flwr.app import Message

from fedgraft_client.cache import keep
from fedgraft_client.data import Records, check_records
from fedgraft_client.head import LinearHead, initial_head
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_client.refit import refit_head
from fedgraft_client.runtime import Runtime, Workbench
from fedgraft_client.store import SiteStore
from fedgraft_client.training import train_round
from fedgraft_client.units import unit_index
from fedgraft_common.errors import MessageError, PlanError, PrivacyError
from fedgraft_common.mechanism import StepNoise, step_noise
from fedgraft_common.messages import (
    Status,
    Tensors,
    from_record,
    read_request,
    to_record,
    write_reply,
)
from fedgraft_common.plan import Plan, parse_plan

log = logging.getLogger(__name__)


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
        store: where its head and replies are kept.

    Raises:
        DataError: the records cannot be used.
    """

    def __init__(
        self, config: SiteConfig, records: Records, runtime: Runtime, store: SiteStore
    ) -> None:
        check_records(records, config.classes, config.name)
        self.config = config
        self.records = records
        self.runtime = runtime
        self.store = store
        self.last_error: Exception | None = None
        self._caches: dict[int, tuple[Workbench, Cached]] = {}
        self._plans: dict[str, tuple[Plan, StepNoise]] = {}

    def answer(self, message: Message) -> Message:
        """The reply to one round's request: adapter, round, status."""
        self.last_error = None
        number = 0
        try:
            request = read_request(message)
            number = request.round
            plan, step = self._accept(request.plan)
            bench = self.runtime.workbench(plan)
            adapter = from_record(request.adapter, bench.adapted.schema)
            update = self._round(bench, plan, step, number, adapter)
            return write_reply(message, number, Status.OK, to_record(update))
        except (MessageError, PlanError, PrivacyError) as error:
            self.last_error, status = error, Status.REFUSED
        except Exception as error:  # Flower would send an uncaught exception's text to the server
            self.last_error, status = error, Status.FAILED
            log.debug("site %s, round %d", self.config.name, number, exc_info=True)
        log.warning("site %s, round %d: %s: %s", self.config.name, number, status, self.last_error)
        return write_reply(message, number, status)

    def _accept(self, text: str) -> tuple[Plan, StepNoise]:
        """Checks a plan once, and what it would cost here."""
        if text not in self._plans:
            try:
                document = json.loads(text)
            except ValueError:
                raise MessageError(
                    "plan", "not JSON", "a plan as canonical JSON", "The message was ignored."
                ) from None
            plan = parse_plan(document, origin="request")
            if plan.privacy.mechanism != "local" and not self.config.simulated:
                raise PrivacyError(
                    "privacy.mechanism", plan.privacy.mechanism, "local, at a site with real data",
                    "Without secure aggregation the server would see this site's own sum with "
                    "little noise or none; simulate the plan instead.",
                )  # fmt: skip
            self._plans[text] = plan, self.step(plan)
        return self._plans[text]

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
        if self.config.simulated:
            noise = NoiseSource.for_simulation("round", plan.hash, self.config.name, number)
        else:
            noise = NoiseSource.from_operating_system()
        cached, labels = self.cached(bench), self.records.labels
        update = train_round(
            bench,
            plan,
            number,
            adapter,
            head,
            cached,
            labels,
            step,
            noise,
            self.runtime.physical_batch,
            self.records.units,
        )
        self.store.save_round(plan, number, head, update)
        return update

    def cached(self, bench: Workbench) -> Cached:
        """What the frozen prefix makes of the training records; computed once."""
        key = id(bench)
        if key not in self._caches:
            kept = keep(bench.cache(self.records.images), self.store.directory)
            self._caches[key] = (bench, kept)
        return self._caches[key][1]

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
