"""Membership inference: scores that are higher for records that a model was trained on.

Every attack here sees the same: how likely each model finds each record's own label, and for the
reference models (trained by the auditor on known random halves) which records they had. A score is
only ever compared with other scores of the same attack.

    Attack-P   the model's confidence itself, against the population   Ye et al. 2022, section 4
    Attack-R   the share of reference models that are less confident   Ye et al. 2022, section 4
    RMIA       the likelihood ratio of the record, ranked among those  Zarifzadeh et al. 2024,
               of the population                                       section 3, offline
    LiRA       likelihood under Gaussians fitted to reference models   Carlini et al. 2022,
               with and without the record                             algorithm 1

Shapes: N records, R reference models. Confidences are log-probabilities of the record's label.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Scores = NDArray[np.float64]
Members = NDArray[np.bool_]

OFFLINE = 0.3
"""RMIA's a: how models that had a record differ from those that had not (appendix B.2.2)."""
FEW = 8
"""Reference models of a kind below which LiRA takes one variance for all records."""


def attack_p(confidence: Scores) -> Scores:
    """The model's own confidence.

    Args:
        confidence: (N,) of the model under attack.

    Returns:
        (N,) scores.
    """
    return confidence


def attack_r(confidence: Scores, reference: Scores, had: Members) -> Scores:
    """The share of reference models without the record that are less confident; ties count half.

    Args:
        confidence: (N,) of the model under attack.
        reference: (R, N) of the reference models.
        had: (R, N) whether a reference model was trained on a record.

    Returns:
        (N,) scores in [0, 1]; a half for a record that every reference model had.
    """
    wins = (confidence > reference) + 0.5 * (confidence == reference)
    without = ~had
    count = without.sum(axis=0)
    share = (wins * without).sum(axis=0) / np.maximum(count, 1)
    return np.where(count > 0, share, 0.5)


def rmia(
    confidence: Scores, reference: Scores, had: Members, population: NDArray[np.int64] | None = None
) -> Scores:
    """How much of the population the record's likelihood ratio exceeds (offline RMIA, gamma 1).

    The ratio is p(x | model) / p(x); p(x) is estimated from reference models without the record as
    ((1 + a) p_out + 1 - a) / 2. A record that every reference model had takes their mean as it is.

    Args:
        confidence: (N,) of the model under attack.
        reference: (R, N) of the reference models.
        had: (R, N) whether a reference model was trained on a record.
        population: indices of the records z to rank among; default all.

    Returns:
        (N,) scores in [0, 1].
    """
    probability, references = np.exp(confidence), np.exp(reference)
    without = ~had
    count = without.sum(axis=0)
    out = (references * without).sum(axis=0) / np.maximum(count, 1)
    offline = 0.5 * ((1 + OFFLINE) * out + (1 - OFFLINE))
    marginal = np.where(count > 0, offline, references.mean(axis=0))
    ratio = probability / np.maximum(marginal, np.finfo(np.float64).tiny)
    ranked = np.sort(ratio if population is None else ratio[population])
    found: Scores = np.searchsorted(ranked, ratio, side="right") / len(ranked)
    return found


def lira(confidence: Scores, reference: Scores, had: Members) -> Scores:
    """The log-likelihood ratio of two Gaussians: models that had the record, and others (online).

    Args:
        confidence: (N,) of the model under attack.
        reference: (R, N) of the reference models; 64 and more are usual.
        had: (R, N) whether a reference model was trained on a record.

    Returns:
        (N,) scores; 0 for a record that all reference models had, or none of them.
    """
    scaled, references = logit(confidence), logit(reference)
    inside, outside = _fit(references, had), _fit(references, ~had)
    score = norm.logpdf(scaled, *inside) - norm.logpdf(scaled, *outside)
    both = had.any(axis=0) & (~had).any(axis=0)
    return np.where(both, score, 0.0)


def logit(confidence: Scores) -> Scores:
    """log(p / (1 - p)) of a log-probability, which makes confidences nearly Gaussian."""
    least = np.finfo(np.float64).eps
    rest = np.log(np.maximum(-np.expm1(confidence), least))
    return np.maximum(confidence, np.log(least)) - rest


def _fit(values: Scores, chosen: Members) -> tuple[Scores, Scores]:
    """Mean and standard deviation over the chosen models, per record."""
    count = np.maximum(chosen.sum(axis=0), 1)
    mean = (values * chosen).sum(axis=0) / count
    square = ((values - mean) ** 2 * chosen).sum(axis=0) / count
    if chosen.sum(axis=0).min() < FEW:
        square = np.full_like(square, ((values - mean) ** 2)[chosen].mean() if chosen.any() else 1)
    return mean, np.sqrt(square) + 1e-6
