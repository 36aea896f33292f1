"""Inversion: can a record be drawn from what a site sends? Long, for all its scenes are here.

The attacker is the server of the `updates` attack, with more: it knows the labels and the head, has
images of the same kind of its own, and asks about one record at a time. What it sees goes from what
no site sends to what the server of this plan really gets:

    one record              its gradient, as if a site sent that           the positive control
    clipped                 to C
    clipped, with noise     a batch of that record alone
    a whole round           the clipped sum over a site's batch, without noise
    a round as sent         the same with the site's noise
    all sites together      the sum over sites, with all their noise

Beside them stands what the attacker could draw without seeing anything. The head's gradient, which
never leaves, is inverted analytically to show why.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch.nn import functional

from fedgraft_client.dp import JointOptimizer
from fedgraft_client.head import LinearHead
from fedgraft_client.randomness import NoiseSource
from fedgraft_common.mechanism import StepNoise
from fedgraft_common.messages import Tensors
from fedgraft_simulations.audit.candidates import Candidates
from fedgraft_simulations.audit.gradient_matching import (
    Matching,
    layer_input,
    match_gradients,
    nearest_starts,
    total_variation,
)
from fedgraft_simulations.audit.likeness import identified, lpips, lpips_missing, psnr, ssim
from fedgraft_simulations.audit.membership import candidates_of
from fedgraft_simulations.audit.part import AuditContext, Figure, Finding, PartResult, Report, worst
from fedgraft_simulations.audit.rehearsal import Rehearsal
from fedgraft_simulations.audit.roc import to_png
from fedgraft_simulations.audit.text_trial import Recovered, recover_texts
from fedgraft_simulations.audit.victim import Victim

ONE, CLIPPED, NOISED = "one record", "clipped", "clipped, with noise"
ROUND, SENT, TOGETHER = "a whole round", "a round as sent", "all sites together"
SCENES = (ONE, CLIPPED, NOISED, ROUND, SENT, TOGETHER)
PRIOR = "nothing seen"
GAIN = 2.0
"""dB above the prior from which a reconstruction counts as one."""
SIGNIFICANCE = 0.01
"""Of calling as many identifications a leak as guessing gives only this often."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much work an effort stands for.

    Attributes:
        targets: records attacked, each of another site where there are enough.
        matching: how hard.
    """

    targets: int
    matching: Matching


SIZES = {"quick": Size(3, Matching(120, 2, 0.05)), "full": Size(6, Matching(300, 3))}
BUDGET = 3e12
"""Multiplications and additions of forward passes that an attack may take; about two minutes."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One line of the picture.

    Attributes:
        name: of `SCENES`, or `PRIOR`.
        images: (N, C, H, W) what the attacker drew.
        psnr: (N,) dB.
        ssim: (N,).
        lpips: (N,), or None.
        identified: (N,) whether it is nearer to the truth than to any other image.
    """

    name: str
    images: torch.Tensor
    psnr: torch.Tensor
    ssim: torch.Tensor
    lpips: torch.Tensor | None
    identified: torch.Tensor

    @property
    def hits(self) -> int:
        """How many records were identified."""
        return int(self.identified.sum())


@dataclass(frozen=True)
class Target:
    """A record under attack.

    Attributes:
        site: its number.
        row: of `Candidates.records`; its unit was trained on.
    """

    site: int
    row: int


class InversionPart:
    """The part `inversion` of an audit."""

    name = "inversion"
    title = "Hiding the records themselves"

    def run(self, context: AuditContext, progress: Report) -> PartResult:
        """Draws records from what is seen, from nothing to all."""
        started = time.perf_counter()
        size, run = SIZES[context.effort], context.rehearsal
        bench = run.sites[0].bench(run.plan)
        progress(0.05, "what the attacker sees")
        candidates = candidates_of(run)
        targets = choose_targets(context, candidates, size.targets)
        adapter = bench.initial if run.plan.head.training == "fixed" else run.adapter
        heads = [site.trained_head(run.plan) for site in run.sites]
        kind = bench.adapted.backbone.modality
        if kind != "image" or any(site.labels.dim() != 1 for site in candidates):
            return _not_attacked(self, "another task" if kind == "image" else kind, started)
        victims = {t.site: Victim.of_images(run.plan, adapter, heads[t.site]) for t in targets}
        seen = observe(context, run, candidates, targets, victims, adapter)
        bench.release()
        how = affordable(size, victims[targets[0].site], truths(candidates, targets)[:1])
        scenes = draw_scenes(candidates, targets, victims, seen, how, progress)
        noise = [site.step(run.plan).head_std for site in run.sites]
        random = context.random("inversion", "head")
        analytic = analytic_hits(candidates, targets, victims, noise, random)
        gallery = min(alike(candidates, target) for target in targets)
        words = recover_texts(context.random("inversion", "text"), max(noise) or 1.0)
        findings = (
            *_findings(run.plan.privacy.mechanism, scenes, analytic, gallery),
            _text_finding(words),
        )
        truth = truths(candidates, targets)
        figure = Figure(
            "Records, and what an attacker makes of what is seen",
            "First line: the records. Second: the attacker's guess before seeing anything. Then "
            "what is drawn from one record's gradient (nobody sends that), from a whole round, and "
            "from what the server gets. A line that looks like the second has told nothing.",
            picture(truth, scenes),
        )
        missing = lpips_missing()
        return PartResult(
            self.name, self.title, worst(findings), _summary(scenes, run.plan.privacy.mechanism),
            findings, (figure,), _facts(scenes, analytic),
            (
                *([missing] if missing else []),
                "Gradient matching is a search: that it finds nothing is no proof, and stronger "
                "priors may find more. The bound on any reconstruction is the epsilon of the plan.",
                "Attacks over many rounds at once are left to the membership part, which uses all "
                "of them.",
            ),
            time.perf_counter() - started,
        )  # fmt: skip


def affordable(size: Size, victim: Victim, image: torch.Tensor) -> Matching:
    """The effort, with fewer steps and starts where the backbone is large."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        victim(image)
    passes = BUDGET / max(1, counter.get_total_flops()) / (size.targets * len(SCENES))
    how = size.matching
    restarts = max(1, min(how.restarts, int(passes / how.iterations)))
    iterations = max(10, min(how.iterations, int(passes / restarts)))
    return replace(how, restarts=restarts, iterations=iterations)


def choose_targets(
    context: AuditContext, candidates: Sequence[Candidates], count: int
) -> list[Target]:
    """Records of units that were trained on, one site after the other."""
    random = context.random("inversion", "targets")
    found = []
    for number in range(count):
        site = number % len(candidates)
        rows = np.flatnonzero(candidates[site].members[candidates[site].units])
        found.append(Target(site, int(random.choice(rows))))
    return found


def alike(candidates: Sequence[Candidates], target: Target) -> int:
    """How many records have a target's label: whoever knows it guesses one of these."""
    site = candidates[target.site]
    same = [c.labels for c in candidates if c.share.classes == site.share.classes]
    return int((torch.cat(same) == site.labels[target.row]).sum())


def truths(candidates: Sequence[Candidates], targets: Sequence[Target]) -> torch.Tensor:
    """(N, C, H, W) the records themselves."""
    return torch.stack([images_of(candidates[t.site])[t.row] for t in targets])


def observe(
    context: AuditContext,
    run: Rehearsal,
    candidates: Sequence[Candidates],
    targets: Sequence[Target],
    victims: dict[int, Victim],
    adapter: Tensors,
) -> dict[str, torch.Tensor]:
    """(N, D) gradients for each scene, clipped and noised by the trainer's own code."""
    bench = run.sites[0].bench(run.plan)
    steps = [site.step(run.plan) for site in run.sites]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in SCENES}
    for number, target in enumerate(targets):
        site, victim, step = candidates[target.site], victims[target.site], steps[target.site]
        image, label = images_of(site)[target.row], site.labels[target.row]
        alone = np.arange(len(site.members)) == site.units[target.row]

        def sent(
            index: int, chosen: NDArray[np.bool_], noise: float, scene: str,
            number: int = number, victim: Victim = victim,
        ) -> torch.Tensor:  # fmt: skip
            source = NoiseSource.for_simulation(context.seed, "inversion", scene, number, index)
            head = run.sites[index].trained_head(run.plan)
            sums = noisy_sum(
                run, adapter, head, candidates[index], chosen, steps[index], noise, source
            )
            return victim.flat(bench.adapted, sums)

        batches = []
        for index, other in enumerate(candidates):
            random = context.random("inversion", "batch", number, index)
            drawn = random.random(len(other.members)) < steps[index].sample_rate
            batches.append((other.members & drawn) | (alone if index == target.site else False))
        seen[ONE].append(victim.gradients(image[None], label[None])[0].detach())
        seen[CLIPPED].append(sent(target.site, alone, 0.0, CLIPPED))
        seen[NOISED].append(sent(target.site, alone, step.head_std, NOISED))
        seen[ROUND].append(sent(target.site, batches[target.site], 0.0, ROUND))
        every = [
            sent(index, batch, steps[index].adapter_std, SENT)
            for index, batch in enumerate(batches)
        ]
        seen[SENT].append(every[target.site])
        seen[TOGETHER].append(torch.stack(every).sum(dim=0))
    return {name: torch.stack(rows) for name, rows in seen.items()}


def noisy_sum(
    run: Rehearsal,
    adapter: Tensors,
    head: LinearHead,
    site: Candidates,
    chosen: NDArray[np.bool_],
    step: StepNoise,
    noise_std: float,
    noise: NoiseSource,
) -> Tensors:
    """One step of the trainer on chosen units: what `JointOptimizer` makes of them.

    Args:
        run: whose model.
        adapter: where the step starts.
        head: of the site.
        site: whose units.
        chosen: (U,) the batch.
        step: holds C.
        noise_std: standard deviation on each value of the adapter's sum.
        noise: its source.

    Returns:
        The adapter's gradient sum, by schema name.
    """
    bench = run.sites[0].bench(run.plan)
    model, engine = bench.trainer(head)
    bench.adapted.load(adapter)
    trained = [p for p in model.head.parameters() if p.requires_grad]
    groups = [
        {"params": list(bench.adapted.adapter.values()), "noise_std": noise_std},
        {"params": trained, "noise_std": step.head_std},
    ]
    solver = torch.optim.SGD([group for group in groups if group["params"]], lr=1.0)
    joint = JointOptimizer(solver, step.clipping_norm, noise)
    rows = np.flatnonzero(chosen[site.units])
    rows = rows[np.argsort(site.units[rows], kind="stable")]
    sizes = None
    if run.plan.privacy.unit != "record":
        sizes = torch.from_numpy(np.unique(site.units[rows], return_counts=True)[1])
    cached = tuple(tensor[rows] for tensor in site.cached)
    joint.noisy_sum(engine, cached, site.labels[rows], run.sites[0].runtime.physical_batch, sizes)
    gradients = {n: cast(torch.Tensor, p.grad) for n, p in bench.adapted.adapter.items()}
    sums = {name: gradient.detach().cpu().clone() for name, gradient in gradients.items()}
    joint.zero_grad(set_to_none=True)
    return sums


def draw_scenes(
    candidates: Sequence[Candidates],
    targets: Sequence[Target],
    victims: dict[int, Victim],
    seen: dict[str, torch.Tensor],
    how: Matching,
    progress: Report,
) -> list[Scene]:
    """Runs the attack on each record; all scenes of a record at once."""
    drawn: dict[str, list[torch.Tensor]] = {name: [] for name in (PRIOR, *SCENES)}
    for number, target in enumerate(targets):
        victim, site = victims[target.site], candidates[target.site]
        own, own_labels = attackers_images(candidates, site)
        label = site.labels[target.row]
        same = own[own_labels == label]
        drawn[PRIOR].append((same if len(same) else own).mean(dim=0))
        names = [name for name in SCENES if name != CLIPPED or not same_direction(seen, number)]
        labels = label.repeat(len(names))
        gradients = torch.stack([seen[name][number] for name in names])
        starts = nearest_starts(victim.gradients, gradients, labels, own, own_labels, how.restarts)

        def told(step: int, number: int = number) -> None:
            if step % 20 == 0:
                done = (number + step / how.iterations) / len(targets)
                progress(0.1 + 0.85 * done, f"record {number + 1} of {len(targets)}")

        found = match_gradients(
            victim.gradients, gradients, labels, starts, how, total_variation, on_step=told
        )
        pictures = dict(zip(names, found, strict=True))
        for name in SCENES:
            drawn[name].append(pictures.get(name, pictures[ONE]))
    truth = truths(candidates, targets)
    gallery = torch.cat([images_of(site) for site in candidates])
    scenes = []
    for name, images in drawn.items():
        stack = torch.stack(images)
        scenes.append(
            Scene(
                name, stack, psnr(stack, truth), ssim(stack, truth), lpips(stack, truth),
                identified(stack, truth, gallery),
            )
        )  # fmt: skip
    return scenes


def same_direction(seen: dict[str, torch.Tensor], number: int) -> bool:
    """Whether clipping only shortened a gradient; the attack, a cosine, then cannot tell."""
    one, clipped = seen[ONE][number].double(), seen[CLIPPED][number].double()
    return float(functional.cosine_similarity(one, clipped, dim=0)) > 1 - 1e-6


def attackers_images(
    candidates: Sequence[Candidates], site: Candidates
) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out images and labels of every site with the same classes: what the attacker owns."""
    same = [c for c in candidates if c.share.classes == site.share.classes]
    held = [~torch.from_numpy(c.members[c.units]) for c in same]
    images = [images_of(c)[rows] for c, rows in zip(same, held, strict=True)]
    labels = [c.labels[rows] for c, rows in zip(same, held, strict=True)]
    return torch.cat(images), torch.cat(labels)


def images_of(site: Candidates) -> torch.Tensor:
    """(N, C, H, W) a site's candidates, which are images."""
    images = site.records.inputs
    assert isinstance(images, torch.Tensor)  # noqa: S101 - the part refuses other modalities
    return images


def analytic_hits(
    candidates: Sequence[Candidates],
    targets: Sequence[Target],
    victims: dict[int, Victim],
    noise: Sequence[float],
    random: np.random.Generator,
) -> dict[str, int]:
    """Records told by the features that the head's gradient would give away, if it were sent.

    Args:
        candidates: of every site.
        targets: records attacked.
        victims: by site.
        noise: for each site, standard deviation of the noise on the head's gradient sum.
        random: draws it.

    Returns:
        By scene, how many of the targets are nearest to their own features among all candidates of
        the site: exact, clipped to length 1 and noised, summed over the site's members.
    """
    hits = {ONE: 0, NOISED: 0, ROUND: 0}
    for target in targets:
        victim, site = victims[target.site], candidates[target.site]
        weight, bias = victim.head_gradients(images_of(site), site.labels)
        with torch.no_grad():
            known = victim.features(images_of(site))
        mine = weight[target.row], bias[target.row]
        length = torch.cat([mine[0].flatten(), mine[1]]).norm().clamp(min=1e-9)

        def noisy(value: torch.Tensor, length: torch.Tensor = length) -> torch.Tensor:
            draw = torch.from_numpy(random.normal(0, noise[target.site], tuple(value.shape)))  # noqa: B023
            return (value / length + draw).float()

        trained = torch.from_numpy(site.members[site.units])
        views = {
            ONE: mine,
            NOISED: (noisy(mine[0]), noisy(mine[1])),
            ROUND: (weight[trained].sum(dim=0), bias[trained].sum(dim=0)),
        }
        for name, (rows, column) in views.items():
            found = functional.normalize(layer_input(rows[None], column[None]), dim=1)
            cosine = (found @ functional.normalize(known, dim=1).T).abs()[0]
            hits[name] += int(cosine.argmax()) == target.row
    return hits


def picture(truth: torch.Tensor, scenes: Sequence[Scene]) -> bytes:
    """Records above, and one line for each scene, as a PNG."""
    from matplotlib.figure import Figure as Canvas

    count = len(truth)
    canvas = Canvas(figsize=(2.6 + 0.95 * count, 1.0 * (len(scenes) + 1)), dpi=150)
    grid = canvas.subplots(len(scenes) + 1, count, squeeze=False)
    lines = [("the records", truth)]
    lines += [
        (
            f"{s.name}\n{float(s.psnr.mean()):.1f} dB, {s.hits} of {count} told",
            s.images,
        )
        for s in scenes
    ]
    for axes, (words, images) in zip(grid, lines, strict=True):
        for place, image in zip(axes, images, strict=True):
            pixels = image.permute(1, 2, 0).clamp(0, 1).numpy()
            shown = pixels if pixels.shape[2] == 3 else pixels[..., 0]
            place.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            place.set(xticks=[], yticks=[])
        axes[0].set_ylabel(words, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    canvas.subplots_adjust(
        left=2.2 / (2.6 + 0.95 * count), right=0.99, top=0.99, bottom=0.01, hspace=0.06,
        wspace=0.06,
    )  # fmt: skip
    return to_png(canvas)


def described(scene: Scene) -> str:
    """What was achieved in a scene."""
    text = (
        f"{scene.name}: {scene.hits} of {len(scene.images)} records identified, PSNR "
        f"{float(scene.psnr.mean()):.1f} dB, SSIM {float(scene.ssim.mean()):.2f}"
    )
    return text if scene.lpips is None else f"{text}, LPIPS {float(scene.lpips.mean()):.2f}"


def leaks(scene: Scene, prior: Scene, gallery: int) -> bool:
    """Whether a scene shows more of the records than the prior, or a guess among `gallery`, does.

    More records are identified than guessing explains (binomial, at `SIGNIFICANCE`), or the
    pictures are `GAIN` dB nearer on average.
    """
    count = len(scene.images)
    guess = max(prior.hits / count, 1 / gallery)
    told = guess < 1 and binomtest(scene.hits, count, guess, "greater").pvalue < SIGNIFICANCE
    return bool(told or float((scene.psnr - prior.psnr).mean()) > GAIN)


def _findings(
    mechanism: str, scenes: Sequence[Scene], analytic: dict[str, int], gallery: int
) -> list[Finding]:
    by_name = {scene.name: scene for scene in scenes}
    prior, count = by_name[PRIOR], len(scenes[0].images)
    works = leaks(by_name[ONE], prior, gallery)
    reached = {"local": (SENT, TOGETHER), "distributed": (TOGETHER,), "none": (ONE, ROUND, SENT)}
    findings = [
        Finding(
            "The attack is able to draw a record: it does from the record's own gradient, DP off",
            f"{described(by_name[ONE])}; {described(prior)}",
            "pass" if works else "info",
            "Gradient matching with the true label, started from the attacker's nearest images."
            if works
            else "It is not: this backbone's adapter gradient gave this attack no picture. What "
            "follows then says little.",
            "positive control",
        )
    ]
    for name in reached[mechanism]:
        found = leaks(by_name[name], prior, gallery)
        findings.append(
            Finding(
                "A record that is alone in its batch cannot be drawn"
                if name == ONE
                else f"No record can be drawn from what the server gets ({name})",
                f"{described(by_name[name])}; {described(prior)}",
                "fail" if found else "pass",
                f"A leak is more identifications than guessing gives (binomial, {SIGNIFICANCE:g}) "
                f"or {GAIN:g} dB more than with nothing seen.",
                name,
            )
        )
    findings.append(
        Finding(
            "For comparison: what clipping and noise each do",
            "; ".join(described(by_name[n]) for n in SCENES if n != ONE),
            "info",
            "Clipping alone shortens a gradient and hides nothing of its direction.",
            "what each does",
        )
    )
    findings.append(
        Finding(
            "For comparison: the head's gradient, which never leaves, would give features away",
            "; ".join(f"{name}: {hits} of {count} identified" for name, hits in analytic.items()),
            "info",
            "Analytic: the gradient of a linear layer's weight divided by its bias' is its input. "
            "This is why the head stays at the site.",
            "head",
        )
    )
    return findings


def _text_finding(words: Recovered) -> Finding:
    return Finding(
        "For comparison: the same attack on the embeddings of a text",
        f"{words.bare:.0%} of the words recovered at their place from one text's gradient, "
        f"{words.noised:.0%} after clipping and noise; a guess gives {words.guess:.0%}",
        "info",
        "On a small encoder with random weights, made for this; the plan's own is not one of text.",
        "text",
    )


def _not_attacked(part: InversionPart, modality: str, started: float) -> PartResult:
    finding = Finding(
        "No record can be drawn from what the server gets",
        f"not attacked: the plan's records are {modality}",
        "info",
        "The attack draws images.",
        "not attacked",
    )
    return PartResult(
        part.name, part.title, "info", f"Not attacked: this part draws images, not {modality}.",
        (finding,), (), {}, (f"Records of the kind {modality} were not attacked by inversion.",),
        time.perf_counter() - started,
    )  # fmt: skip


def _summary(scenes: Sequence[Scene], mechanism: str) -> str:
    by_name = {scene.name: scene for scene in scenes}
    count = len(scenes[0].images)
    bare = f"From a record's bare gradient {by_name[ONE].hits} of {count} records were identified"
    if mechanism == "none":
        sent = by_name[SENT]
        return f"{bare}; from a round as it is sent without DP, {sent.hits} of {count}."
    name = SENT if mechanism == "local" else TOGETHER
    return f"{bare}; from what the server of this plan gets, {by_name[name].hits} of {count}."


def _facts(scenes: Sequence[Scene], analytic: dict[str, int]) -> dict[str, object]:
    return {
        "scenes": [
            {
                "name": scene.name,
                "psnr": [round(float(v), 3) for v in scene.psnr],
                "ssim": [round(float(v), 4) for v in scene.ssim],
                "lpips": None if scene.lpips is None else [round(float(v), 4) for v in scene.lpips],
                "identified": scene.hits,
                "records": len(scene.images),
            }
            for scene in scenes
        ],
        "analytic_on_the_head": analytic,
    }
