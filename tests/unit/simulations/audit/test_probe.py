"""A probe changes nothing but what its canaries add."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedgraft_client.dp import JointOptimizer
from fedgraft_client.prefix import Cached
from fedgraft_client.randomness import NoiseSource
from fedgraft_simulations.audit.probe import (
    CLIPPED,
    HEAD,
    SUMMED,
    Canaries,
    Place,
    Probe,
    ProbedOptimizer,
)

ADAPTER, HEADS = 6, 4
C = 0.5
WHERE = np.zeros(0, np.int64)  # places in messages, of which there are none here


class Gradients:
    """Per-unit gradients that are the records themselves."""

    name = "records"

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters

    def __call__(self, cached: Cached, labels: torch.Tensor) -> None:
        adapter, head = self.parameters
        adapter.grad_sample = cached[0][:, :ADAPTER].reshape(-1, 2, 3)  # type: ignore[attr-defined]
        head.grad_sample = cached[0][:, ADAPTER:]  # type: ignore[attr-defined]

    def close(self) -> None:
        """Nothing to close."""


def canaries(kinds: list[int], included: list[bool], coordinates: list[int]) -> Canaries:
    return Canaries(
        np.array(coordinates), np.array(kinds), np.zeros(len(kinds), np.int64), np.array(included)
    )


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(HEADS))]


def groups(made: list[torch.nn.Parameter], noise: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [p], "lr": 0.1, "noise_std": noise} for p in made])


def records(count: int = 5) -> torch.Tensor:
    return 3 * torch.randn(count, ADAPTER + HEADS, generator=torch.Generator().manual_seed(0))


def probed_step(
    probe: Probe, noise: float = 0.0, units: torch.Tensor | None = None
) -> NDArray[np.float64]:
    """The joint gradient after one step in which everybody takes part."""
    made, data = parameters(), records()
    place = Place(probe, 0, 1, probe.held_by(0), len(data), units, most=8)
    source = NoiseSource.for_simulation("probe")
    joint = ProbedOptimizer(place, groups(made, noise), C, source)
    sizes = None if units is None else torch.bincount(place.units)
    cached, labels = place.mark((data,)), place.extend(torch.zeros(len(data), dtype=torch.int64))
    joint.noisy_sum(Gradients(made), cached, labels, 256, sizes)
    return torch.cat([p.grad.reshape(-1) for p in made]).double().numpy()  # type: ignore[union-attr]


def plain_step(noise: float = 0.0, units: torch.Tensor | None = None) -> NDArray[np.float64]:
    made, data = parameters(), records()
    joint = JointOptimizer(groups(made, noise), C, NoiseSource.for_simulation("probe"))
    sizes = None if units is None else torch.bincount(units)
    labels = torch.zeros(len(data), dtype=torch.int64)
    joint.noisy_sum(Gradients(made), (data,), labels, 256, sizes)
    return torch.cat([p.grad.reshape(-1) for p in made]).double().numpy()  # type: ignore[union-attr]


@pytest.mark.parametrize("units", [None, torch.tensor([0, 0, 1, 2, 2])])
def test_without_an_included_canary_the_step_is_the_same_bit_for_bit(
    units: torch.Tensor | None,
) -> None:
    probe = Probe(canaries([SUMMED, CLIPPED], [False, False], [1, 2]), C, 1, 1, WHERE)
    assert (probed_step(probe, 1.0, units) == plain_step(1.0, units)).all()


@pytest.mark.parametrize("kind", [SUMMED, CLIPPED, HEAD])
@pytest.mark.parametrize("units", [None, torch.tensor([0, 0, 1, 2, 2])])
def test_a_canary_adds_the_clipping_norm_at_its_coordinate(
    kind: int, units: torch.Tensor | None
) -> None:
    where = ADAPTER + 2 if kind == HEAD else 4
    probe = Probe(canaries([kind, SUMMED], [True, False], [where, 0]), C, 1, 1, WHERE)
    added = probed_step(probe, 1.0, units) - plain_step(1.0, units)
    expected = np.zeros(ADAPTER + HEADS)
    expected[where] = C
    assert added == pytest.approx(expected, abs=1e-5)


def test_a_canary_patient_has_records_enough_to_show_that_each_is_clipped_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    units = torch.tensor([0, 0, 0, 1, 2])  # so the canary has three
    probe = Probe(canaries([CLIPPED], [True], [4]), C, 1, 1, WHERE)
    sound = probed_step(probe, 1.0, units) - plain_step(1.0, units)
    assert sound[4] == pytest.approx(C, abs=1e-5)
    monkeypatch.setattr(JointOptimizer, "_average", lambda *_: None)  # each record is a unit
    broken = probed_step(probe, 1.0, units) - plain_step(1.0, units)
    assert broken[4] == pytest.approx(3 * C, abs=1e-5)


def test_what_others_contributed_is_noted_without_canary_and_noise() -> None:
    probe = Probe(canaries([SUMMED, CLIPPED, HEAD], [True] * 3, [1, 3, 8]), C, 1, 1, WHERE)
    noisy = probed_step(probe, 2.0)
    clean = plain_step(0.0)
    assert probe.others[0, 0] == pytest.approx(clean[[1, 3, 8]], abs=1e-6)
    assert probe.head[0, 0, 2] == pytest.approx(noisy[8], abs=1e-6)
    assert probe.head[0, 0, :2] == pytest.approx(0.0)


def test_the_batch_is_noted_with_canaries_as_units() -> None:
    probe = Probe(canaries([SUMMED, SUMMED], [True, True], [1, 3]), C, 1, 1, WHERE)
    probed_step(probe, 0.0, torch.tensor([0, 0, 1, 2, 2]))
    (drawn,) = probe.drawn
    assert drawn.units.tolist() == [0, 1, 2, 3, 4]
    assert drawn.of == 5
    probed_step(probe)
    assert probe.drawn[1].of == 7


def test_a_canary_alone_in_the_batch_is_noised_too() -> None:
    probe = Probe(canaries([SUMMED], [True], [1]), C, 1, 1, WHERE)
    made = parameters()
    place = Place(probe, 0, 1, probe.held_by(0), 5, None)
    joint = ProbedOptimizer(place, groups(made, 1.0), C, NoiseSource.for_simulation("probe"))
    only = torch.tensor([5])
    cached = tuple(t[only] for t in place.mark((records(),)))
    joint.noisy_sum(Gradients(made), cached, torch.zeros(1, dtype=torch.int64), 256)
    noise = NoiseSource.for_simulation("probe").gaussian((ADAPTER,), 1.0)
    noise[1] += C
    assert made[0].grad is not None
    assert torch.allclose(made[0].grad.reshape(-1).double(), noise, atol=1e-6)


def test_the_trainer_is_itself_again_afterwards(tmp_path: Path) -> None:
    from fedgraft_client import site, training

    before = vars(site)["train_round"], vars(training)["JointOptimizer"]
    probe = Probe(canaries([SUMMED], [True], [1]), C, 1, 1, WHERE)
    with pytest.raises(RuntimeError), probe.watching(0):
        assert vars(site)["train_round"] is not before[0]
        raise RuntimeError
    assert (vars(site)["train_round"], vars(training)["JointOptimizer"]) == before
