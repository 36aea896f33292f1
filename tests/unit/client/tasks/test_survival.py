"""Time to an event: the likelihood by hand, censoring, and Harrell's index by counting pairs."""

from __future__ import annotations

import math

import pytest
import torch

from fedgraft_client.tasks import build_task
from fedgraft_client.tasks.reading import Written
from fedgraft_client.tasks.survival import Survival
from fedgraft_common.errors import DataError
from fedgraft_common.task_spec import TaskSpec

SPEC = TaskSpec(kind="survival", cuts=(1.0, 2.0, 4.0))
TASK = Survival(SPEC)
OUTPUTS = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("time", "event", "through", "ended"),
    [
        (0.5, 1, [], 0),  # died in the first interval
        (1.5, 1, [0], 1),
        (3.9, 1, [0, 1], 2),
        (4.0, 1, [0, 1, 2], None),  # after the last cut point: only that it got there
        (9.0, 0, [0, 1, 2], None),
        (2.5, 0, [0, 1], None),  # lost in the third: counts for the two before it
        (0.5, 0, [], None),  # lost in the first: says nothing
    ],
)
def test_likelihood_by_hand(time: float, event: int, through: list[int], ended: int | None) -> None:
    hazards = 1 - OUTPUTS[0].sigmoid()
    chance = math.prod(1 - float(hazards[j]) for j in through)
    chance *= 1 if ended is None else float(hazards[ended])
    labels = torch.tensor([[time, float(event)]])
    assert float(TASK.loss(OUTPUTS, labels)) == pytest.approx(-math.log(chance), abs=1e-5)


def test_fitted_hazards_are_the_observed_shares() -> None:
    """Without features the best hazards are events over those at risk (Kaplan and Meier 1958)."""
    labels = torch.tensor(
        [[0.5, 1], [0.5, 1], [1.5, 1], [1.5, 0], [3.0, 1], [5.0, 0], [5.0, 0], [5.0, 1]]
    )
    outputs = torch.zeros(1, 3, requires_grad=True)
    solver = torch.optim.LBFGS([outputs], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        solver.zero_grad()
        loss = TASK.loss(outputs.expand(8, 3), labels).sum()
        loss.backward()
        return loss

    solver.step(objective)
    hazards = 1 - outputs.detach().sigmoid()[0]
    assert torch.allclose(hazards, torch.tensor([2 / 8, 1 / 5, 1 / 4]), atol=1e-3)


def test_concordance_by_counting_pairs() -> None:
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(25, 3, generator=generator)
    time = torch.rand(25, generator=generator) * 4 + 0.1
    event = torch.rand(25, generator=generator) < 0.6
    risk = TASK.risk(outputs)
    right = pairs = 0.0
    for i in range(25):
        for j in range(25):
            if event[i] and time[i] < time[j]:
                pairs += 1
                right += float(risk[i] > risk[j]) + 0.5 * float(risk[i] == risk[j])
    found = TASK.scores(outputs, torch.stack([time, event.float()], dim=1))["concordance"]
    assert found == pytest.approx(right / pairs, abs=1e-5)


def test_nothing_to_compare_is_no_score() -> None:
    found = TASK.scores(OUTPUTS.expand(2, 3), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    assert math.isnan(found["concordance"])


def test_more_risk_means_earlier() -> None:
    early, late = TASK.risk(torch.tensor([[-5.0, -5, -5], [5.0, 5, 5]]))
    assert early > late


def test_words_for_the_event() -> None:
    found = TASK.read(Written([["3", 2], ["dead", "alive"]], {"dead": "1", "alive": "0"}))
    assert found.values.tolist() == [[3, 1], [2, 0]]


@pytest.mark.parametrize("cuts", [(), (0.0, 1.0), (2.0, 1.0)])
def test_cut_points_rise_from_zero(cuts: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="rising times above zero"):
        build_task(SPEC.model_copy(update={"cuts": cuts}))


@pytest.mark.parametrize("label", [[0.0, 1.0], [1.0, 2.0], [math.inf, 1.0]])
def test_labels_that_make_no_sense(label: list[float]) -> None:
    with pytest.raises(DataError, match="a finite time above zero"):
        TASK.check(torch.tensor([label]), "site north")
