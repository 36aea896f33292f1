"""One class for a whole sequence, decided step by step: a recording, a signal, a long text.

Labels: (N,) int64. Outputs: (N, K), the mean over the sequence of each step's log-probabilities;
steps that are padding have features of zero and are left out. Where `single-label` asks the
backbone for one summary of the record, this asks at every step, which suits backbones that have
no summary of their own.
"""

from __future__ import annotations

from fedgraft_client.tasks.single_label import SingleLabel
from fedgraft_common.features import FeatureKind


class SequenceToClass(SingleLabel):
    """A `SingleLabel` over tokens; see `MeanOverTokens` for its head."""

    features: FeatureKind = "tokens"
