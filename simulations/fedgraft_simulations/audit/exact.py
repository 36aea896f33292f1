"""What the accountant takes for granted, tested exactly: the noise, its freshness, q and T.

A bound on epsilon is cautious; these tests are not. They ask whether the noise that left has the
promised strength and shape and is new every time (`noise.py`), whether batches are Poisson samples
(`sampling.py`), and whether there were as many as the ledgers were charged for. The noise on
released evaluations is tested like that of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from fedgraft_simulations.audit.noise import check_noise
from fedgraft_simulations.audit.part import Finding
from fedgraft_simulations.audit.probe import HEAD
from fedgraft_simulations.audit.sampling import batches_of, check_sampling
from fedgraft_simulations.audit.trial import Trial


class ExactTests:
    """Of the runs with canaries; those that need only one run look at the first.

    Args:
        trials: the runs, at least one.
        private: whether anything is promised; if not, there is no noise to test.
        heads: whether sites train their heads under DP.
        random: the auditor's.

    Attributes:
        facts: every number, for `audit.json`.
    """

    def __init__(
        self, trials: Sequence[Trial], private: bool, heads: bool, random: np.random.Generator
    ) -> None:
        self.trials = trials
        self.private = private
        self.heads = heads
        self.random = random
        self.facts: dict[str, object] = {}

    def findings(self) -> list[Finding]:
        """Everything that was tested."""
        found = []
        if self.private:
            found.append(self._strength("adapter"))
            if self.heads:
                found.append(self._strength("head"))
            found += [self._fresh(), *self._evaluations()]
        return [*found, self._steps(), self._sampling()]

    def _strength(self, which: str) -> Finding:
        check = check_noise(self._noise_of(which), self.random)
        self.facts[f"noise of the {which}"] = asdict(check)
        return Finding(
            f"The noise in the {which}'s gradient is as strong as the ledger says",
            f"{check.strength:.2%} of it, {check.values:,} values",
            "pass" if check.strong else "fail",
            f"Between {check.low:.2%} and {check.high:.2%}. "
            "What was sent, less what records contributed, at coordinates without a canary.",
            f"strength, {which}",
        )  # fmt: skip

    def _fresh(self) -> Finding:
        check = check_noise(self._noise_of("adapter"), self.random)
        return Finding(
            "The noise is Gaussian, and no two messages share it",
            f"largest correlation between two messages {check.correlation:.3f}",
            "pass" if check.well_made else "fail",
            f"p-value of the shape {check.gaussian:.2g}, of the correlation {check.fresh:.2g}; "
            "every message of the first run with canaries against every other.",
            "fresh noise",
        )  # fmt: skip

    def _noise_of(self, which: str) -> NDArray[np.float64]:
        """(messages, values) of the first trial, in units of the promised deviation."""
        trial = self.trials[0]
        canaries = trial.canaries
        empty = ~canaries.included & ((canaries.kind == HEAD) == (which == "head"))
        std = trial.adapter_std
        if which == "head":
            root = math.sqrt(trial.plan.training.local_steps)
            std = np.array([step.head_std for step in trial.steps]) * root
        seen = trial.seen[:, :, empty] / std[None, :, None]
        return seen.reshape(-1, seen.shape[2]).astype(np.float64)

    def _evaluations(self) -> Iterator[Finding]:
        """The noise of released evaluations, if the plan asks for any."""
        if not self.trials[0].plan.evaluations:
            return
        claim, name = (
            "The noise on released evaluations is as strong as the ledger says, and always new",
            "strength, evaluations",
        )
        noise = np.concatenate([trial.counts for trial in self.trials])
        if not noise.size:
            yield Finding(claim, "the plan asks for evaluations, and none left", "fail", name=name)
            return
        check = check_noise(noise, self.random)
        self.facts["noise of evaluations"] = asdict(check)
        yield Finding(
            claim,
            f"{check.strength:.1%} of it, {check.values:,} counts",
            "pass" if check.strong and check.well_made else "fail",
            f"Between {check.low:.1%} and {check.high:.1%}; what left, less what was counted. "
            f"p-value of the shape {check.gaussian:.2g}, of the correlation between two "
            f"evaluations {check.fresh:.2g}.",
            name,
        )

    def _steps(self) -> Finding:
        """The accountant's T, against the batches that were really drawn."""
        planned = self.trials[0].plan.steps
        taken: list[int] = []
        charged: list[int] = []
        for trial in self.trials:
            taken += batches_of(trial.drawn, len(trial.steps))
            charged += trial.charged
        self.facts["steps"] = {"planned": planned, "taken": max(taken), "charged": min(charged)}
        uncharged = self.private and any(t > c for t, c in zip(taken, charged, strict=True))
        also = f", {min(charged)} charged at least" if self.private else ""
        return Finding(
            "No site looks at its data more often than it is charged for",
            f"{max(taken)} batches at most, {planned} planned{also}",
            "fail" if uncharged or max(taken) > planned else "pass",
            "Batches that the trainer drew at each site, against the steps of the plan and of the "
            "site's ledger.",
            "steps",
        )

    def _sampling(self) -> Finding:
        trial = self.trials[0]
        rates = [step.sample_rate for step in trial.steps]
        check = check_sampling(trial.drawn, rates, self.random)
        self.facts["sampling"] = asdict(check)
        return Finding(
            "Every batch is a fresh coin for every record, as the accountant assumes",
            f"{check.batches:,} batches, {check.rate:.3f} of the records in one "
            f"(q {check.expected_rate:.3f})",
            "pass" if check.poisson or not self.private else "fail",
            f"p-values against Poisson sampling: sizes of batches {check.sizes:.2g}, how often "
            f"each record was drawn {check.units:.2g}, rate {check.total:.2g}.",
            "sampling",
        )
