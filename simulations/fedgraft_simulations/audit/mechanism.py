"""The mechanism audit: is the noise as good as the ledger says? T1, T1b, T2 and T3 of PRIVACY.md.

    trial.py           the plan, run with canaries in the real trainer    -> T2, T1, T1b
    exact.py           the noise that left and the batches that were drawn, against the accountant's
    blackbox.py        mislabelled records and the released model alone   -> T3

T2 decides, with a thousand canaries or more. All bounds that can fail, T1, T1b and T3 included,
share one significance of `SIGNIFICANCE` in equal parts (Bonferroni), so that they hold together
with 95 % confidence, and a sound mechanism is called broken in fewer than one of twenty audits; in
practice in far fewer, because a bound by Clopper and Pearson on two error rates at once, and on a
sampled mechanism by a Gaussian curve, is cautious three times over. The exact tests of noise and
sampling have 1e-5 each on top.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from fedgraft_client.runtime import Runtime
from fedgraft_simulations.audit.blackbox import BlackBox, run_black_box
from fedgraft_simulations.audit.certificate import (
    best_share,
    certificate,
    gaussian_certificate,
    guesses,
)
from fedgraft_simulations.audit.charts import bounds_chart, scores_chart
from fedgraft_simulations.audit.exact import ExactTests
from fedgraft_simulations.audit.gaussian_bound import GaussianBound, gaussian_bound
from fedgraft_simulations.audit.part import (
    AuditContext,
    Figure,
    Finding,
    PartResult,
    Report,
    Verdict,
    worst,
)
from fedgraft_simulations.audit.probe import CLIPPED, HEAD, SUMMED
from fedgraft_simulations.audit.trial import Observer, Trial, run_trial
from fedgraft_simulations.table import epsilon_words

SIGNIFICANCE = 0.05
GATE = 1000
"""Canaries that T2 needs at least to decide."""
CANARIES = {"quick": 1000, "full": 2000}
MOST_TRIALS = 64
ONE_RUN, BLACK_BOX = 2, 1
"""Bounds besides T2 that share its significance: T1 and T1b; T3."""
BLACK_BOX_SHARE = 0.25
"""Guesses of T3, IN and OUT each, as a share of the canaries; fixed before looking."""

SEES: dict[Observer, str] = {
    "single": "the server, which sees each site's own updates",
    "server": "the server, which sees sums over all sites",
    "worst": "the server, with the tolerated colluders and dropouts",
}


class MechanismPart:
    """See the module."""

    name = "mechanism"
    title = "The noise"

    def run(self, context: AuditContext, progress: Report) -> PartResult:
        """Runs the plan with canaries, then with mislabelled records, and measures."""
        started = time.perf_counter()
        runtime = Runtime(context.device)
        trials = _trials(context, runtime, lambda done, what: progress(0.75 * done, what))
        black_box = run_black_box(
            context,
            context.directory / self.name / "black-box",
            lambda number: progress(
                0.75 + 0.25 * number / context.plan.rounds.count, "mislabelled records"
            ),
            runtime,
        )
        measured = Measured(context, trials, black_box)
        findings = tuple(measured.findings())
        measured.facts["epsilon_lower_bound"] = max(low for _, low, _ in measured.bounds)
        return PartResult(
            name=self.name,
            title=self.title,
            verdict=worst(findings),
            summary=measured.summary(worst(findings)),
            findings=findings,
            figures=tuple(measured.figures()),
            facts=measured.facts,
            not_covered=tuple(_not_covered(context)),
            seconds=time.perf_counter() - started,
        )


def _trials(context: AuditContext, runtime: Runtime, progress: Report) -> list[Trial]:
    """Runs with canaries until there are enough for the gate."""
    found: list[Trial] = []
    wanted, counted, expected = CANARIES[context.effort], 0, 1

    while counted < wanted and len(found) < MOST_TRIALS:
        place = len(found)

        def told(number: int, place: int = place, expected: int = expected) -> None:
            done = (place + number / context.plan.rounds.count) / max(expected, place + 1)
            progress(done, f"canaries, run {place + 1} of {max(expected, place + 1)}")

        directory = context.directory / "mechanism" / f"trial-{place}"
        found.append(run_trial(context, directory, place, told, runtime))
        each = int((found[0].canaries.kind == SUMMED).sum())
        if each == 0:
            break
        counted += each
        expected = min(MOST_TRIALS, math.ceil(wanted / each))
    return found


class Measured:
    """What the runs show.

    Args:
        context: the audit.
        trials: runs with canaries, at least one.
        black_box: the run with mislabelled records.

    Attributes:
        facts: every number, for `audit.json`.
    """

    def __init__(self, context: AuditContext, trials: list[Trial], black_box: BlackBox) -> None:
        self.context = context
        self.trials = trials
        self.black_box = black_box
        self.delta = context.plan.privacy.delta
        self.claimed = max(trial.claimed for trial in trials)
        self.private = math.isfinite(self.claimed)
        self.facts: dict[str, object] = {
            "claimed": _number(self.claimed),
            "delta": self.delta,
            "trials": len(trials),
        }
        self.bounds: list[tuple[str, float, float | None]] = []
        self.random = context.random("mechanism", "choice")
        self.strongest = trials[0].observers[-1]
        kinds = trials[0].canaries.kind
        watched = [kind for kind in (SUMMED, CLIPPED, HEAD) if (kinds == kind).any()]
        views = len(trials[0].observers) - 1  # SUMMED canaries are one more test for each
        single = "single" not in trials[0].observers
        repetition = context.plan.rounds.count > 2
        self.significance = SIGNIFICANCE / (
            len(watched) + views + single + repetition + ONE_RUN + BLACK_BOX
        )
        self.kinds = watched

    # -- the findings, in the order in which they are read

    def findings(self) -> list[Finding]:
        """Everything that was checked."""
        observers = self.trials[0].observers
        found = [self._charged(), *(self._gate(observer) for observer in observers)]
        if "single" not in observers:
            found.append(self._single())
        if self.context.plan.secure:
            found.append(self._opening())
        if CLIPPED in self.kinds:
            claim = "A record with a huge gradient counts no more than any other"
            detail = "Canaries a thousand times the clipping norm, put in before clipping."
            found.append(self._bound("clipping", claim, CLIPPED, self.strongest, np.sum, detail))
        if HEAD in self.kinds:
            claim = "The site's own head is trained under the same promise"
            detail = (
                "Canaries in the head's part of the gradient. Nobody outside sees it; the "
                "accountant assumes that it might be seen."
            )
            found.append(self._bound("head", claim, HEAD, "single", np.sum, detail))
        if self.context.plan.rounds.count > 2:
            claim = "Noise is never used twice"
            detail = (
                "Scored by how much a canary's coordinate varies from round to round: noise that "
                "repeats does not vary."
            )
            found.append(self._bound("repetition", claim, SUMMED, self.strongest, np.var, detail))
        exact = ExactTests(self.trials, self.private, HEAD in self.kinds, self.random)
        found += exact.findings()
        self.facts |= exact.facts
        found += [*self._one_run(), self._mislabelled()]
        return found

    def _charged(self) -> Finding:
        promised = self.context.plan.privacy.epsilon
        self.facts["promised"] = promised if self.private else None
        if not self.private:
            return Finding(
                "The plan bounds what an attacker can learn",
                "it does not: privacy.mechanism is none, so epsilon is infinite", "fail",
                name="promise",
            )  # fmt: skip
        return Finding(
            f"The plan promises epsilon {promised:g}; no site is charged more",
            f"{self.claimed:.4f} charged at delta {self.delta:g}",
            "pass" if self.claimed <= promised * (1 + 1e-9) else "fail",
            "From the ledgers of the sites in the runs with canaries.",
            "promise",
        )

    def _gate(self, observer: Observer) -> Finding:
        finding = self._bound(
            f"noise, {observer}", f"The noise hides every record from {SEES[observer]}", SUMMED,
            observer, np.sum, "T2 of PRIVACY.md: white-box canaries added to the clipped sum.",
        )  # fmt: skip
        counted = sum(int((trial.canaries.kind == SUMMED).sum()) for trial in self.trials)
        if counted < GATE and finding.verdict == "pass":
            return Finding(
                finding.claim, f"only {counted} canaries fit into {len(self.trials)} runs, of "
                f"{GATE} that a verdict needs; {finding.measured}", "fail",
                "The adapter has too few values for a white-box audit.", finding.name,
            )  # fmt: skip
        return finding

    def _single(self) -> Finding:
        """What the distributed mechanism rests on: not a failure, but an auditor must know."""
        bound = self._t2(SUMMED, "single", np.sum)
        self._keep("noise, without secure aggregation", bound)
        return Finding(
            "The promise rests on secure aggregation: the server sees only sums",
            f"whoever saw one site's own sum would learn more: {_words(bound)}", "info",
            "The same canaries, observed in their own site's reply.", "without secure aggregation",
        )  # fmt: skip

    def _opening(self) -> Finding:
        """The production protocol ran: what the server read is the sum, and is all that it read."""
        error = max(trial.opening_error for trial in self.trials) / self.trials[0].length
        self.facts["secure sum"] = {"error": error}
        return Finding(
            "Secure aggregation gives the server the sum of what the sites computed",
            f"what the server read differs from it by {error:.1e} of the clipping norm at most",
            "pass" if error < 1e-3 else "fail",
            "Masks, shares and signatures are those of production; that masked messages hide what "
            "is in them is a matter of the protocol's proof, not measured here.",
            "secure sum",
        )  # fmt: skip

    def _bound(
        self, name: str, claim: str, kind: int, observer: Observer,
        statistic: Callable[..., NDArray[np.float64]], detail: str,
    ) -> Finding:  # fmt: skip
        bound = self._t2(kind, observer, statistic)
        self._keep(name, bound)
        self.bounds.append((name, bound.epsilon, bound.estimate))
        verdict = self._holds(bound.epsilon)
        promised = f"promised {epsilon_words(self.claimed)}" if self.private else "nothing promised"
        return Finding(
            claim, f"{_words(bound)}; {promised}", verdict,
            f"{detail} {2 * bound.canaries:,} canaries; wrong calls on half of them: "
            f"{bound.false_positives:.1%} of those left out, {bound.false_negatives:.1%} of those "
            "put in.", name,
        )  # fmt: skip

    def _t2(
        self, kind: int, observer: Observer, statistic: Callable[..., NDArray[np.float64]]
    ) -> GaussianBound:
        scores, included = self._scores(kind, observer, statistic)
        choosing = self.random.permutation(len(scores)) % 2 == 0
        return gaussian_bound(scores, included, choosing, self.delta, self.significance)

    def _scores(
        self, kind: int, observer: Observer, statistic: Callable[..., NDArray[np.float64]]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        scores, included = [], []
        for trial in self.trials:
            mine = trial.canaries.kind == kind
            scores.append(statistic(trial.views(observer)[:, mine], axis=0))
            included.append(trial.canaries.included[mine])
        return np.concatenate(scores), np.concatenate(included)

    def _one_run(self) -> list[Finding]:
        """T1 and T1b on T2's canaries."""
        scores, included = self._scores(SUMMED, self.strongest, np.sum)
        choosing = self.random.permutation(len(scores)) % 2 == 0
        share = best_share(scores[choosing], included[choosing])
        counted = guesses(scores[~choosing], included[~choosing], share)
        found = []
        for name, short, method, assumes in (
            ("certificate", "T1", certificate, "without any assumption about the mechanism"),
            ("Gaussian certificate", "T1b", gaussian_certificate, "assuming a Gaussian mechanism"),
        ):
            epsilon = method(counted, self.delta, self.significance)
            self.facts[name] = {**asdict(counted), "epsilon": epsilon}
            self.bounds.append((name, epsilon, None))
            verdict = self._holds(epsilon)
            finding = Finding(
                f"Guessing which canaries were there does not refute the promise, {assumes}",
                f"{counted.right} of {counted.made} guesses right: epsilon at least {epsilon:.2f}",
                verdict,
                f"{short} of PRIVACY.md, {1 - self.significance:.1%} confidence. A weak test: it "
                "cannot see noise at half strength.",
                name,
            )
            found.append(finding)
        return found

    def _mislabelled(self) -> Finding:
        counted = guesses(self.black_box.scores, self.black_box.included, BLACK_BOX_SHARE)
        epsilon = certificate(counted, self.delta, self.significance)
        self.facts["mislabelled"] = {**asdict(counted), "epsilon": epsilon}
        self.bounds.append(("mislabelled records", epsilon, None))
        return Finding(
            "Whoever has only the released model cannot tell which mislabelled records were used",
            f"{counted.right} of {counted.made} guesses right: epsilon at least {epsilon:.2f}",
            "info" if not self.private and epsilon == 0 else self._holds(epsilon),
            f"T3 of PRIVACY.md: {counted.canaries} mislabelled records, half of them in the "
            "training data, scored by the fall of their loss.",
            "mislabelled records",
        )

    def _holds(self, epsilon: float) -> Verdict:
        """Whether a measured epsilon is within what is promised."""
        return "pass" if self.private and epsilon <= self.claimed else "fail"

    def _keep(self, name: str, bound: GaussianBound) -> None:
        self.facts[name] = {key: _number(value) for key, value in asdict(bound).items()}

    # -- words and pictures

    def summary(self, verdict: Verdict) -> str:
        """One sentence."""
        highest = max(epsilon for _, epsilon, _ in self.bounds)
        if not self.private:
            return (
                "Nothing is promised and nothing protects the records: an attacker who sees what "
                f"leaves tells who took part (measured epsilon at least {highest:.1f})."
            )
        if verdict == "fail":
            return (
                "The mechanism does not keep its promise: at least one test found more leaking "
                f"than the promised epsilon {epsilon_words(self.claimed)} allows, or noise or "
                "sampling that are not what was accounted."
            )
        return (
            f"The noise keeps its promise: the strongest test shows a leak of at least epsilon "
            f"{highest:.2f}, and up to {epsilon_words(self.claimed)} is promised."
        )

    def figures(self) -> list[Figure]:
        """Bounds beside the claim; the scores behind the gate."""
        scores, included = self._scores(SUMMED, self.strongest, np.sum)
        return [
            Figure(
                "What was measured, beside what is promised",
                "Each mark is a lower bound: the true epsilon is to its right, with 95 % "
                "confidence for all of them together. A bound to the right of the promise would "
                "refute it. Open marks: "
                "what the scores suggest, without confidence.",
                bounds_chart(self.bounds, self.claimed),
            ),
            Figure(
                "How well canaries can be told apart",
                "Scores of canaries that were put in and of canaries that were left out. The more "
                "the two overlap, the less an attacker learns.",
                scores_chart(scores, included),
            ),
        ]


def _words(bound: GaussianBound) -> str:
    return (
        f"epsilon at least {bound.epsilon:.2f} ({1 - bound.significance:.1%} confidence), "
        f"about {bound.estimate:.2f}"
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _not_covered(context: AuditContext) -> list[str]:
    plan = context.plan
    found = [
        "The runs draw reproducible noise from the plan; a site draws from its operating system. "
        "The code behind is the same, the quality of the operating system's generator is taken on "
        "trust.",
        "A lower bound never proves a promise: a leak that no test looks for stays unseen.",
        "Canaries are coordinates; a gradient that is wrong for real records is caught by the "
        "check of per-example gradients that every trainer makes before it starts, not here.",
    ]
    if plan.privacy.mechanism == "distributed":
        found.append(
            "Whether secure aggregation really hides each site's own sum: that rests on its "
            "cryptography and on the honest sites that the plan counts on."
        )
    return found
