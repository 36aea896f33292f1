"""A site's gradient sum as integers modulo 2^bits, and the noise share it carries.

    x  the site's sum of clipped gradients, L values, real
    z  = round(s * clamp(x, -R, R)), integers                            s a power of two
    y  = z + share, share from N_Z(0, share.std^2)                       modulo 2^bits
    server: sum of y over the sites modulo 2^bits -> signed integer -> divided by s

Formal guarantee, add or remove one unit of one site; n sites, h noise shares that the observer does
not know, noise multiplier sigma, clipping norm C. The server's sum and the site's own noisy head,
together, are a post-processing of one Gaussian mechanism with multiplier sigma, but for a factor
within exp(+- 1e-60) for each value and an event of probability `failure`:

 1. Clamping is a projection on a box, value by value, so x still moves by at most C together with
    the head. Rounding moves each value by at most 1/2 on either side: z moves by at most s |g| +
    sqrt(L) where x moved by g. In units of x, adapter and head together move by at most
    `sensitivity` = C + sqrt(L) / s.
 2. Each share is N_Z(0, v), v = ((sigma s sensitivity)^2 + 9) / h. The sum of h of them is N_Z(0, h
    v), and N_Z(0, h v) added to integers is a post-processing of N(0, (sigma s sensitivity)^2)
    added to them (`discrete_gaussian`, 1 and 2; at most 24 h + 3 factors 1 +- 2e-77). Further
    shares, the modulus, and everything the server does are post-processing too. The head gets
    continuous noise of standard deviation sigma C (1 + 0.002), at least sigma * sensitivity
    (`mechanism.step_noise`).
 3. Tables that end at 15 standard deviations are within `failure` of the above in total variation,
    which adds (1 + exp(epsilon)) `failure` to delta in each step: far below the millionth of
    delta that `mechanism.step_noise` sets aside (`RESERVED`, checked).

Not in this bound: x is a float32 sum of m clipped gradients, and one unit may change its rounding
as well, by at most about 2 m^2 2^-24 C (Higham 2002, section 4.2, any order of summation): 2.4e-4 C
at m = 45. The local mechanism has the same.

So the account's event (q, sigma, T) stays what it was, with the noise a little larger: by
`overhead`: at most 0.2 % from rounding, and next to nothing from the disguise.

No overflow, by construction: |z| <= s R and |share| <= share.bound whatever is drawn, so every
partial sum over at most n sites is within n (s R + share.bound) < 2^(bits - 1), and the signed
reading of the sum modulo 2^bits is the sum itself. `encode` checks both bounds.

R = C (B + 4 sqrt(B) + 4) for an expected batch B: a value is clamped only if more units than that
pull it the same way at full length. s is the largest power of two that fits; 64 bits are used where
32 would leave rounding more than 0.2 %. Values then stay below 2^53, so that float64 holds them.

Source of the design: Kairouz, Liu and Steinke 2021, "The distributed discrete Gaussian mechanism
for federated learning with secure aggregation", algorithms 1 and 2. It differs in that rounding is
deterministic (its cost is in the sensitivity above), nothing is rotated, and the noise is held
against the continuous one instead of bounded by concentrated DP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedgraft_common.discrete_gaussian import ERROR, SMOOTH, DiscreteGaussian, sampler
from fedgraft_common.errors import PlanError, PrivacyError
from fedgraft_common.mechanism import MOST_ROUNDING, RESERVED, noise_multiplier
from fedgraft_common.plan import Plan

Vector = NDArray[np.unsignedinteger[Any]]
BITS: Final[tuple[Literal[32, 64], ...]] = (32, 64)

LEAST_SHARE: Final = 2 * SMOOTH
"""Least standard deviation of a share in integers, so that sums of shares meet the lemma."""
_EXACT: Final = 53  # bits of a float64


class IntegerNoise(Protocol):
    """Where a share comes from: `fedgraft_client.randomness.NoiseSource`."""

    def discrete_gaussian(self, size: int, sampler: DiscreteGaussian) -> NDArray[np.int64]:
        """Independent samples, (size,)."""


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """How one run's sums become integers and back.

    Attributes:
        bits: of the modulus, 32 or 64.
        length: L, values of a sum.
        sites: n; at most so many vectors are added.
        shares: h, noise shares that are certain to be in a sum and unknown to the observer.
        scale: s, integers per unit of the gradient sum; a power of two.
        limit: R, the clamp, in units of the gradient sum.
        clipping_norm: C, the same unit.
        noise_multiplier: sigma, as the account has it.
    """

    bits: Literal[32, 64]
    length: int
    sites: int
    shares: int
    scale: float
    limit: float
    clipping_norm: float
    noise_multiplier: float

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the vectors that are added."""
        return np.dtype(f"uint{self.bits}")

    @property
    def sensitivity(self) -> float:
        """Of adapter and head together, rounding included, in units of the gradient sum."""
        return self.clipping_norm + math.sqrt(self.length) / self.scale

    @property
    def share(self) -> DiscreteGaussian:
        """The noise that each site adds, in integers."""
        full = self.noise_multiplier * self.sensitivity * self.scale
        return sampler(math.sqrt((full**2 + SMOOTH**2) / self.shares))

    @property
    def sum_std(self) -> float:
        """Standard deviation of h shares, in units of the gradient sum."""
        return self.share.std * math.sqrt(self.shares) / self.scale

    @property
    def ratio(self) -> float:
        """Of the noise to the sensitivity, both with all that integers add to them."""
        return self.sum_std / self.sensitivity

    @property
    def overhead(self) -> float:
        """How much larger the noise is than the continuous mechanism's, as a share of it."""
        return self.sum_std / (self.noise_multiplier * self.clipping_norm) - 1

    @property
    def failure(self) -> float:
        """Total variation distance of all sites' shares of one step from the proof's."""
        return ERROR * self.share.levels * self.length * self.sites

    @property
    def fits(self) -> bool:
        """Whether no sum can overflow, and rounding and noise are as the proof needs them."""
        most = (2 ** (min(self.bits, _EXACT) - 1) - 1) // self.sites
        return (
            math.ceil(self.limit * self.scale) + self.share.bound <= most
            and math.sqrt(self.length) <= MOST_ROUNDING * self.scale * self.clipping_norm
            and self.share.std >= LEAST_SHARE
        )

    def encode(self, total: NDArray[np.floating[Any]], noise: IntegerNoise) -> Vector:
        """One site's vector, its noise share included.

        Args:
            total: (L,) the sum of its clipped gradients without noise, float32 or float64.
            noise: draws the share.

        Returns:
            (L,) of `dtype`.

        Raises:
            PrivacyError: another shape, a value that is not a number, or a share out of bounds.
        """
        if total.shape != (self.length,):
            raise _fault("gradient sum", f"shape {total.shape}", f"({self.length},)")
        if np.isnan(total).any():
            raise _fault("gradient sum", "NaN", "numbers")
        share = noise.discrete_gaussian(self.length, self.share)
        if share.shape != (self.length,) or np.abs(share).max(initial=0) > self.share.bound:
            raise _fault("noise share", "a sample out of bounds", f"at most {self.share.bound}")
        clamped = np.clip(total.astype(np.float64), -self.limit, self.limit)
        return (np.rint(clamped * self.scale).astype(np.int64) + share).astype(self.dtype)

    def decode(self, total: Vector) -> NDArray[np.float64]:
        """The sum of at most n vectors modulo 2^bits, in units of the gradient sum: (L,).

        Raises:
            PrivacyError: another shape or dtype.
        """
        if total.dtype != self.dtype or total.shape != (self.length,):
            raise _fault("sum", f"{total.dtype}{total.shape}", f"{self.dtype}({self.length},)")
        return total.view(f"int{self.bits}").astype(np.float64) / self.scale


def fixed_point(plan: Plan, length: int) -> FixedPoint:
    """The encoding that a plan's public numbers call for; all sites and the server agree on it.

    Args:
        plan: distributed; says q, T, epsilon, delta, C, B, n and h.
        length: L, values of the adapter.

    Raises:
        PrivacyError: the promise cannot be met.
        PlanError: the number of sites is unknown or nobody is left to add noise; not even 64 bits
            hold the sum; or epsilon is so large that delta cannot pay for the noise's tables.
    """
    shares, sites, rate = plan.noise_shares, plan.aggregation.sites, plan.training.sample_rate
    assert sites is not None and rate is not None  # noqa: S101 - such a plan has both
    sigma = noise_multiplier(plan, rate)
    norm, batch = plan.privacy.clipping_norm, plan.training.expected_batch
    limit = norm * (batch + 4 * math.sqrt(batch) + 4)
    for bits in BITS:
        scale = 2.0 ** math.floor(math.log2(2 ** (min(bits, _EXACT) - 1) / (sites * limit)))
        while scale * norm * MOST_ROUNDING >= math.sqrt(length):
            found = FixedPoint(bits, length, sites, shares, scale, limit, norm, sigma)
            if found.fits:
                _check_failure(plan, found)
                return found
            scale /= 2
    raise PlanError(
        "aggregation.sites, training.expected_batch", f"{sites} and {batch:g}",
        f"numbers with which a sum of {length} values fits into {_EXACT} bits at noise multiplier "
        f"{sigma:.4g}", "Use fewer sites, a smaller batch or a larger epsilon.",
    )  # fmt: skip


def _check_failure(plan: Plan, found: FixedPoint) -> None:
    privacy = plan.privacy
    most = math.log(RESERVED * privacy.delta / (2 * plan.steps * found.failure))
    if privacy.epsilon > most:  # 2 exp(epsilon) is more than 1 + exp(epsilon)
        raise PlanError(
            "privacy.epsilon", privacy.epsilon,
            f"at most {most:.0f} with secure_aggregation = \"real\"",
            "A larger one promises nothing; use mechanism = \"none\" to compare.",
        )  # fmt: skip


def _fault(field: str, value: str, allowed: str) -> PrivacyError:
    return PrivacyError(
        field, value, allowed, "Nothing left the site. This is a fault of the program: report it."
    )
