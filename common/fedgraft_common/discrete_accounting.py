"""Epsilon of the discrete mechanism itself, computed without the continuous one.

`fixed_point` holds the discrete mechanism against the continuous Gaussian, which `accounting`
composes. This is the independent computation beside it: Rényi DP at integer orders.

Let an integer vector u, |u| <= Delta, be what one unit moves the rounded sums of adapter values by,
Q = N_Z(0, v) on every coordinate, P = Q moved by u, and q the sample rate. For an integer k,

    E_Q[(P / Q)^k] = exp(-k |u|^2 / (2 v)) E_Q[exp(k <u, x> / v)] = exp((k^2 - k) |u|^2 / (2 v)),

with equality because the mean of exp(t x) under N_Z(0, v) is exp(v t^2 / 2) wherever v t is an
integer: completing the square moves the sum over integers by an integer (Canonne, Kamath and
Steinke 2020, section 2, where it is an upper bound for every t). The direction of u does not enter,
and a continuous coordinate, the site's own head, multiplies the same kind of factor. So at an
integer order a

    E_Q[((1 - q) + q P / Q)^a] = sum_k binomial(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 m^2))

at most, m = sqrt(v) / Delta: the formula of the sampled Gaussian (Mironov, Talwar and Zhang 2019,
section 3.3). Removing a unit is the worse direction, by the reflection x -> u - x, which maps
integers to integers (their theorem 5), and other units' random inclusion costs nothing (theorem 4).
"""

from __future__ import annotations

from fedgraft_common.fixed_point import FixedPoint

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)


def discrete_epsilon(encoding: FixedPoint, sample_rate: float, steps: int, delta: float) -> float:
    """Epsilon of `steps` steps, each on its own Poisson sample, add or remove one unit.

    Args:
        encoding: says v (of h shares), and Delta with rounding.
        sample_rate: q.
        steps: T.
        delta: of the promise; conversion by Canonne, Kamath and Steinke 2020, proposition 12.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    step = PoissonSampledDpEvent(sample_rate, GaussianDpEvent(encoding.ratio))
    accountant = RdpAccountant(orders=[float(order) for order in ORDERS])
    return float(accountant.compose(step, steps).get_epsilon(delta))
