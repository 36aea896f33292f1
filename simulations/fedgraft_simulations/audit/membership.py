"""Membership inference: can anyone tell from what a site sent whether a record was among its own?

Three targets, from what everyone gets to what nobody does:

    released adapter    Attack-P, Attack-R and RMIA, against reference runs of the whole federation
    updates             what the server receives, round by round: `update_regression`
    refitted heads      sealed at the site; LiRA with shadow heads on cached features. For the
                        site's own information: nothing of a head leaves, so nothing bounds it

The first two are held against the ceiling of the claimed mechanism. The attack on updates is
repeated with DP off: if it fails there, it proves nothing here.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft_client.head import LinearHead
from fedgraft_client.refit import refit_head
from fedgraft_client.site import Site
from fedgraft_client.store import SiteStore
from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import ADAPTER, Tensors, from_record
from fedgraft_common.plan import Plan
from fedgraft_simulations.audit.candidates import Candidates, log_probability
from fedgraft_simulations.audit.inference import attack_p, attack_r, lira, rmia
from fedgraft_simulations.audit.part import (
    AuditContext,
    Figure,
    Finding,
    PartResult,
    Report,
    worst,
)
from fedgraft_simulations.audit.rehearsal import Rehearsal
from fedgraft_simulations.audit.roc import Roc, against_ceiling, draw, facts, roc_of
from fedgraft_simulations.audit.update_regression import UpdateRegression
from fedgraft_simulations.simulate import variant

UPDATES = ("updates", "updates, noise doubted")
CONTROL_ROUNDS = 6
CONTROL_RUN, OPEN_RUN = 0, -1
"""Numbers of the runs that are no reference: without DP, and with sums in the open."""
CONTROL = 0.1
"""True positive rate that the control must reach at a false positive rate of 1 %: tenfold."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much work an effort stands for.

    Attributes:
        references: runs of the whole federation on random halves of the candidates.
        heads: shadow heads of a site.
        sites: sites whose heads are attacked.
        rounds: rounds whose updates are looked at, evenly spread.
    """

    references: int
    heads: int
    sites: int
    rounds: int


SIZES = {"quick": Size(1, 24, 2, 6), "full": Size(4, 64, 16, 24)}


class MembershipPart:
    """The part `membership` of an audit."""

    name = "membership"
    title = "Hiding who took part"

    def run(self, context: AuditContext, progress: Report) -> PartResult:
        """Attacks the rehearsal's adapter, updates and heads, and a run without DP."""
        started = time.perf_counter()
        size, plan = SIZES[context.effort], context.plan
        progress(0.0, "rehearsing the plan")
        run = context.rehearsal
        candidates = candidates_of(run)
        members = np.concatenate([site.members for site in candidates])
        progress(0.1, "reference runs")
        released = attack_released(context, candidates, members, size.references, progress)
        progress(0.6, "updates of each round")
        received = run
        if run.plan.secure:  # what the server unmasks is the sum; here it is seen without masks
            chosen = [site.members for site in candidates]
            received = reference_run(context, candidates, chosen, OPEN_RUN)
        updates = attack_updates(context, received, candidates, members, size.rounds)
        progress(0.8, "the same with DP off")
        control = None if _without_dp(plan) else attack_control(context, candidates, members)
        progress(0.9, "refitted heads")
        heads = attack_heads(context, candidates[: size.sites], size.heads)
        events = worst_step(run).events
        curves = [*released, *updates]
        findings = [
            *_ceiling_findings(released, updates, events),
            *_control_findings(control),
            _heads_finding(heads, size.heads),
        ]
        drawn = curves if control is None else [*curves, replace(control, attack="updates, DP off")]
        bound = f"ceiling at epsilon {context.claim.epsilon:.2f}" if events else ""
        figures = (
            Figure(
                "How many members an attacker recognises",
                "Both axes are logarithmic: at the left are attackers who want to be sure. A curve "
                "on the dotted line guesses; bars are 95 % intervals."
                + (
                    " The black line is what the best conceivable attacker could reach against the "
                    "claimed mechanism. A curve that is above it with confidence refutes the claim."
                    if events
                    else ""
                ),
                draw(drawn, events, bound),
            ),
            Figure(
                "A site's own refitted head",
                "What somebody inside the site could learn from the sealed head, which is fitted "
                "without noise. No ceiling is drawn, for none is promised: the head never leaves.",
                draw(heads, (), ""),
            ),
        )
        result = tuple(findings)
        return PartResult(
            self.name, self.title, worst(result), _summary(updates[0], control, events), result,
            figures,
            {
                "released": [facts(roc) for roc in released],
                "updates": [facts(roc) for roc in updates],
                "without_dp": facts(control) if control else None,
                "heads": [facts(roc) for roc in heads],
                "reference_runs": size.references,
                "shadow_heads": size.heads,
            },
            (
                "Members are the plan's ordinary records; the worst conceivable record is what the "
                "mechanism part plants.",
                "An attack that fails proves nothing by itself: a better one may exist, up to the "
                "ceiling.",
                "The server is curious here and follows the protocol; the robustness part lets it "
                "cheat.",
            ),
            time.perf_counter() - started,
        )  # fmt: skip


def attack_released(
    context: AuditContext,
    candidates: Sequence[Candidates],
    members: NDArray[np.bool_],
    count: int,
    progress: Report,
) -> list[Roc]:
    """Attack-P, Attack-R and RMIA on the adapter that anyone may hold later.

    Every run is attacked in turn with the others as references, the rehearsal and the auditor's
    alike, for all were trained alike on random units; so there are (count + 1) times as many
    guesses as candidates.
    """
    runs = [context.rehearsal]
    had = [members]
    confidence = [_confidence(context.rehearsal, candidates)]
    for number in range(1, count + 1):
        progress(0.1 + 0.5 * (number - 1) / count, f"reference run {number} of {count}")
        random = context.random("membership", "reference", number)
        chosen = [site.choose(random) for site in candidates]
        run = reference_run(context, candidates, chosen, number)
        confidence.append(_confidence(run, candidates))
        had.append(np.concatenate(chosen))
        runs.append(run)
    shutil.rmtree(context.directory / "membership" / "references", ignore_errors=True)
    models, truth = np.stack(confidence), np.stack(had)
    scores: dict[str, list[NDArray[np.float64]]] = {"Attack-P": [], "Attack-R": [], "RMIA": []}
    for target in range(len(runs)):
        rest = np.arange(len(runs)) != target
        given = models[target], models[rest], truth[rest]
        scores["Attack-P"].append(attack_p(models[target]))
        scores["Attack-R"].append(attack_r(*given))
        scores["RMIA"].append(rmia(*given))
    return [roc_of(name, np.concatenate(found), truth.flatten()) for name, found in scores.items()]


def reference_run(
    context: AuditContext,
    candidates: Sequence[Candidates],
    chosen: Sequence[NDArray[np.bool_]],
    number: int,
    plan: Plan | None = None,
) -> Rehearsal:
    """The plan once more, by the production code, on other units.

    Args:
        context: of the audit.
        candidates: of each site.
        chosen: (U,) for each site, which units it holds.
        number: of the run; its noise and its directory are its own.
        plan: another plan than the one under audit.

    Sums are added in the open: masks hide the summands from the server, and change nothing in what
    the attacks here look at.
    """
    run, directory = (
        context.rehearsal,
        context.directory / "membership" / "references" / f"{number}",
    )

    def site(index: int) -> Site:
        share = run.shares[index]
        return Site(
            replace(run.sites[index].config, name=f"{share.name}-reference-{number}"),
            candidates[index].taken(chosen[index]),
            run.sites[index].runtime,
            SiteStore(directory / "sites" / share.name, durable=False, unit=run.plan.privacy.unit),
            held_out=share.test,
        )  # fmt: skip

    plan = (plan or run.plan).replace({"privacy.secure_aggregation": "summed"})
    return Rehearsal.run(plan, directory, sites=site, device=context.device)


def attack_updates(
    context: AuditContext,
    run: Rehearsal,
    candidates: Sequence[Candidates],
    members: NDArray[np.bool_],
    rounds: int,
) -> list[Roc]:
    """The attack on the updates of a run, of each site or of their sum.

    Returns:
        With the noise taken for what is claimed, and for little of it; one curve without DP.
    """
    plan = run.plan
    heads = [site.trained_head(plan) for site in run.sites]
    steps = [site.step(plan) for site in run.sites]
    summed = plan.privacy.mechanism == "distributed"
    groups = [list(range(len(candidates)))] if summed else [[i] for i in range(len(candidates))]
    attacks = [
        UpdateRegression(
            plan, [candidates[i] for i in group], [heads[i] for i in group],
            steps[group[0]], len(group), context.random("membership", "values"),
        )
        for group in groups
    ]  # fmt: skip
    spread = np.linspace(1, plan.rounds.count, min(rounds, plan.rounds.count))
    wanted = set(spread.round().astype(int).tolist())
    schema, initial = candidates[0].bench.adapted.schema, candidates[0].bench.initial
    asked = (exchange for exchange in run.exchanges("train") if exchange.round in wanted)
    for number, exchanges in groupby(asked, key=lambda exchange: exchange.round):
        sent: dict[int, Tensors] = {}
        before = initial
        for exchange in exchanges:
            before = from_record(exchange.request.content.array_records[ADAPTER], schema)
            arrays = exchange.reply.content.array_records[ADAPTER]
            sent[exchange.site] = from_record(arrays, schema)
        for group, attack in zip(groups, attacks, strict=True):
            total = {n: torch.stack([sent[i][n] for i in group]).sum(dim=0) for n in before}
            attack.add(number, before, total)
    scores = np.concatenate([attack.solve() for attack in attacks], axis=1)
    return [roc_of(name, row, members) for name, row in zip(UPDATES, scores, strict=False)]


def attack_control(
    context: AuditContext, candidates: Sequence[Candidates], members: NDArray[np.bool_]
) -> Roc:
    """The attack on updates against the same sites, a few rounds without DP."""
    changes = {"rounds.count": min(CONTROL_ROUNDS, context.plan.rounds.count)}
    plan = variant(context.plan, "none").replace(changes)
    chosen = [site.members for site in candidates]
    run = reference_run(context, candidates, chosen, CONTROL_RUN, plan)
    (found,) = attack_updates(context, run, candidates, members, CONTROL_ROUNDS)
    shutil.rmtree(run.directory, ignore_errors=True)
    return found


def attack_heads(context: AuditContext, candidates: Sequence[Candidates], count: int) -> list[Roc]:
    """LiRA and the others on the heads that sites refit and seal, pooled over sites.

    The adapter is released and the prefix cached, so a shadow head is a fit on features: as many
    as an attacker wants, each on as many random units of the site as the site trained on.
    """
    run = context.rehearsal
    found: dict[str, list[NDArray[np.float64]]] = {
        "LiRA": [], "RMIA": [], "Attack-R": [], "Attack-P": []
    }  # fmt: skip
    for index, site in enumerate(candidates):
        random = context.random("membership", "heads", index)
        features = site.features(run.adapter)
        start = run.sites[index].trained_head(run.plan)
        had = np.stack([site.choose(random) for _ in range(count)])

        def confidence(
            chosen: NDArray[np.bool_],
            site: Candidates = site,
            features: torch.Tensor = features,
            start: LinearHead = start,
        ) -> NDArray[np.float64]:
            rows = torch.from_numpy(np.flatnonzero(chosen[site.units]))
            head = refit_head(features[rows], site.labels[rows], start)
            return site.per_unit(log_probability(head, features, site.labels))

        target = confidence(site.members)
        shadows = np.stack([confidence(chosen) for chosen in had])
        found["LiRA"].append(lira(target, shadows, had))
        found["RMIA"].append(rmia(target, shadows, had))
        found["Attack-R"].append(attack_r(target, shadows, had))
        found["Attack-P"].append(attack_p(target))
    members = np.concatenate([site.members for site in candidates])
    return [roc_of(name, np.concatenate(scores), members) for name, scores in found.items()]


def worst_step(run: Rehearsal) -> StepNoise:
    """Sample rate and noise at the site where the plan costs most."""
    delta = run.plan.privacy.delta
    return max((site.step(run.plan) for site in run.sites), key=lambda step: step.epsilon(delta))


def candidates_of(run: Rehearsal) -> list[Candidates]:
    """Of every site of a run."""
    return [
        Candidates.of(share, site.bench(run.plan))
        for share, site in zip(run.shares, run.sites, strict=True)
    ]


def _confidence(run: Rehearsal, candidates: Sequence[Candidates]) -> NDArray[np.float64]:
    """What a run's released adapter, with each site's DP-trained or fixed head, is sure of."""
    return np.concatenate(
        [
            candidate.confidence(run.adapter, site.trained_head(run.plan))
            for candidate, site in zip(candidates, run.sites, strict=True)
        ]
    )


def _without_dp(plan: Plan) -> bool:
    return plan.privacy.mechanism == "none"


def words(roc: Roc, rate: float = 0.01) -> str:
    """Hits at one rate of false alarms, with their interval, and the area."""
    point = next(p for p in roc.points if p.rate == rate)
    low, high = point.interval()
    return (
        f"{roc.attack}: {point.true_positives:.1%} of members at {rate:.0%} false alarms "
        f"(95 %: {low:.1%} to {high:.1%}), AUC {roc.auc:.3f}"
    )


def _ceiling_findings(
    released: Sequence[Roc], updates: Sequence[Roc], events: Sequence[SamplingEvent]
) -> list[Finding]:
    excesses = against_ceiling([*released, *updates], events)
    targets = (
        ("released adapter", "the released adapter", released),
        ("updates", "all updates", updates),
    )
    findings = []
    for check, target, curves in targets:
        best = max(curves, key=lambda roc: roc.points[1].true_positives)
        names = {roc.attack for roc in curves}
        own = [excess for excess in excesses if excess.attack in names]
        above = [excess for excess in own if excess.above]
        cases = tuple(
            f"{e.attack} at {e.point.rate:.1%}: {e.point.hits} of {e.point.members} members and "
            f"{e.point.alarms} of {e.point.others} others, at least {e.lower:.2%} against a "
            f"ceiling of {e.allowed:.2%}"
            for e in own
        )
        if not events:
            broken = any(roc.points[1].interval()[0] > CONTROL for roc in curves)
            findings.append(
                Finding(
                    f"Without DP, who holds {target} cannot tell who took part",
                    words(best),
                    "fail" if broken else "info",
                    "Nothing is promised, so there is no ceiling to hold it against.",
                    check,
                )
            )
            continue
        findings.append(
            Finding(
                f"Nobody who holds {target} recognises members better than epsilon allows",
                words(best) + (f"; above the ceiling at {len(above)} points" if above else ""),
                "fail" if above else "pass",
                "Every attack at each rate of false alarms; limits hold together with 95 % "
                "confidence.",
                check,
                cases,
            )
        )
    return findings


def _control_findings(control: Roc | None) -> list[Finding]:
    if control is None:
        return []
    works = control.points[1].interval()[0] > CONTROL
    return [
        Finding(
            "The attack is able to find members: it does with DP off",
            words(control),
            "pass" if works else "fail",
            f"The same sites and records, {CONTROL_ROUNDS} rounds of the plan without clipping and "
            f"noise; it must reach {CONTROL:.0%} at 1 % with confidence, or its failure elsewhere "
            "says nothing.",
            "positive control",
        )
    ]


def _heads_finding(heads: Sequence[Roc], count: int) -> Finding:
    return Finding(
        "For the site's own information: what its refitted head would tell",
        words(max(heads, key=lambda roc: roc.points[1].true_positives)),
        "info",
        f"{count} shadow heads for each site. The head is fitted without noise and never leaves; "
        "this is why it is sealed.",
        "refitted heads",
    )


def _summary(updates: Roc, control: Roc | None, events: Sequence[SamplingEvent]) -> str:
    share = f"{updates.points[1].true_positives:.0%} of the members"
    if not events or control is None:
        return f"Without DP the server recognises {share} with one false alarm in a hundred."
    off = f"{control.points[1].true_positives:.0%}"
    return (
        f"With one false alarm in a hundred the server recognises {share}; with DP off it would be "
        f"{off}."
    )
