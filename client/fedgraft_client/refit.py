"""The sealed local refit: after the last round a site fits its head without noise, at home.

It costs no privacy because nothing computed from it leaves; a refitted head never takes part in
a round again (PRIVACY.md). The fit is scikit-learn's multinomial logistic regression.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from fedgraft_client.head import LinearHead

INVERSE_REGULARISATION = 10.0  # on unit-length features; one value for every row of a comparison


def refit_head(features: torch.Tensor, labels: torch.Tensor, classes: int) -> LinearHead:
    """Fits a head to a site's own records, without noise.

    Args:
        features: (N, D) float32.
        labels: (N,) int64 in [0, K).
        classes: K. A class without records gets a bias that never wins; a site with one class
            only gets a head that always says so.

    Returns:
        A frozen head.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    head = LinearHead(features.shape[1], classes).requires_grad_(False)
    present = labels.unique()
    head.linear.bias.fill_(-1e4)
    head.linear.bias[present] = 0.0
    if len(present) == 1:
        return head
    unit = torch.nn.functional.normalize(features, dim=-1).numpy().astype(np.float64)
    with warnings.catch_warnings():  # on separable data the last digits never settle
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=300).fit(unit, labels.numpy())
    weight = torch.from_numpy(fit.coef_).float()
    bias = torch.from_numpy(fit.intercept_).float()
    if len(present) == 2:  # scikit-learn gives one row for two classes: the second's margin
        weight = torch.cat([-weight / 2, weight / 2])
        bias = torch.cat([-bias / 2, bias / 2])
    head.linear.weight[present] = weight
    head.linear.bias[present] = bias
    return head
