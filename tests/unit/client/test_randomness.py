from __future__ import annotations

import copy
import math
import os
import pickle
import secrets
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from randomgen import ChaCha
from scipy import stats

from fedgraft_client.randomness import NoiseSource
from fedgraft_common.discrete_gaussian import sampler
from fedgraft_common.errors import PrivacyError

# Statistical tests run on simulated sources with fixed keys: they cannot fail by chance.


def simulated(*key: int | str) -> NoiseSource:
    return NoiseSource.for_simulation("test_randomness", *key)


def in_forked_child(action: Callable[[], bytes]) -> bytes:
    read, write = os.pipe()
    with warnings.catch_warnings():  # torch and numpy have threads; the child does not use them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.write(write, action())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def test_against_cryptography_chacha20_key_stream() -> None:
    for start_block in (0, 1, 2**32 - 2):  # The last one crosses the 32-bit block counter.
        key = secrets.token_bytes(32)
        ours = ChaCha(key=int.from_bytes(key, "little"), rounds=20, counter=16 * start_block)
        words = []
        for block in range(start_block, start_block + 4):
            # OpenSSL's 16 bytes are counter and nonce; DJB's ChaCha has a 64-bit counter there.
            nonce = block.to_bytes(8, "little") + bytes(8)
            encryptor = Cipher(ChaCha20(key, nonce), mode=None).encryptor()
            words.append(np.frombuffer(encryptor.update(bytes(64)), dtype="<u8"))
        np.testing.assert_array_equal(ours.random_raw(8 * 4), np.concatenate(words))


def test_gaussian_has_the_stated_distribution() -> None:
    noise = simulated("distribution").gaussian((1000, 1000), 2.5)
    assert noise.dtype == torch.float64
    assert noise.shape == (1000, 1000)
    values = noise.numpy().ravel()
    assert stats.kstest(values, "norm", args=(0, 2.5)).pvalue > 0.01
    # Relative standard error of a variance of n normals: sqrt(2 / n).
    assert values.var() / 2.5**2 == pytest.approx(1, abs=4 * math.sqrt(2 / values.size))
    assert stats.kurtosis(values) == pytest.approx(0, abs=4 * math.sqrt(24 / values.size))


def test_gaussian_is_the_halved_sum_of_four_numpy_normals() -> None:
    source = simulated("four")
    state = source._generator.bit_generator.state
    ours = source.gaussian((7,), 3.0)
    source._generator.bit_generator.state = state
    four = source._generator.standard_normal((4, 7))
    np.testing.assert_allclose(ours.numpy(), 3.0 * four.sum(axis=0) / 2, rtol=1e-14, atol=1e-15)


def test_gaussian_is_independent_across_coordinates_and_calls() -> None:
    source = simulated("independence")
    # Longer than one internal chunk, so that neighbours in different chunks are compared too.
    first, second = (source.gaussian((300_000,), 1.0).numpy() for _ in range(2))
    limit = 4 / math.sqrt(first.size)
    assert abs(np.corrcoef(first, second)[0, 1]) < limit
    for lag in (1, 2, 4, 1 << 16):
        assert abs(np.corrcoef(first[:-lag], first[lag:])[0, 1]) < 1.5 * limit
        assert abs(np.corrcoef(first[:-lag] ** 2, first[lag:] ** 2)[0, 1]) < 1.5 * limit
    assert np.unique(np.concatenate([first, second])).size == 600_000


def test_gaussian_is_independent_across_steps_of_a_round() -> None:
    """As training draws: a sample, the adapter's noise, the head's, and again."""
    source, steps, size = simulated("steps"), 4000, 24
    rows, sizes = np.empty((steps, size)), np.empty(steps)
    for step, row in enumerate(rows):
        sizes[step] = len(source.poisson_sample(30, 0.5))
        row[:20] = source.gaussian((20,), 0.5).numpy() / 0.5
        row[20:] = source.gaussian((4,), 3.0).numpy() / 3.0
    assert stats.kstest(rows.ravel(), "norm").pvalue > 0.01
    by_coordinate = [stats.kstest(column, "norm").pvalue for column in rows.T]
    assert stats.kstest(by_coordinate, "uniform").pvalue > 1e-3  # each one normal over the steps
    squares = (rows**2).sum(axis=0)  # chi square: variance 1 in every coordinate
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], df=steps)
    assert ((low < squares) & (squares < high)).all()
    limit = 4.5 / math.sqrt(steps)
    for lag in (1, 2, 3, 7):  # every pair of coordinates, in steps that far apart
        for values in (rows, rows**2):
            both = np.corrcoef(values[:-lag].T, values[lag:].T)[:size, size:]
            assert np.abs(both).max() < 1.2 * limit  # 4608 pairs in all
    within = np.corrcoef(rows.T) - np.eye(size)
    assert np.abs(within).max() < limit
    with_sample = [np.corrcoef(sizes, column)[0, 1] for column in rows.T]
    assert np.abs(with_sample).max() < limit
    assert np.unique(rows).size == rows.size


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 4)])
def test_gaussian_shapes(shape: tuple[int, ...]) -> None:
    assert simulated("shapes").gaussian(shape, 1.0).shape == shape
    assert simulated("shapes").gaussian(torch.Size(shape), 1.0).shape == shape


def test_zero_std_gives_zeros() -> None:
    zeros = simulated("zero").gaussian((3, 2), 0.0)
    assert zeros.dtype == torch.float64
    assert torch.equal(zeros, torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_bad_std_is_refused(std: float) -> None:
    with pytest.raises(PrivacyError, match=r"std: found .*finite number of at least 0"):
        simulated("bad").gaussian((2,), std)


def test_poisson_sample_marginal_and_pairwise() -> None:
    source, size, rate, draws = simulated("poisson"), 12, 0.3, 40_000
    included = np.zeros((draws, size))
    for row in included:
        sample = source.poisson_sample(size, rate)
        assert sample.dtype == np.int64
        row[sample] = 1
    standard_error = math.sqrt(rate * (1 - rate) / draws)
    np.testing.assert_allclose(included.mean(axis=0), rate, atol=4 * standard_error)
    correlation = np.corrcoef(included.T) - np.eye(size)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(draws)
    # Sampling a fixed number would fail here: a Poisson sample's size is binomial.
    sizes = np.bincount(included.sum(axis=1).astype(int), minlength=size + 1)
    expected = draws * stats.binom.pmf(np.arange(size + 1), size, rate)
    common = expected > 5
    chi_square = ((sizes - expected)[common] ** 2 / expected[common]).sum()
    assert chi_square < stats.chi2.ppf(0.999, common.sum() - 1)
    # Consecutive draws are independent too.
    assert abs(np.corrcoef(included[:-1].ravel(), included[1:].ravel())[0, 1]) < 0.01


def test_poisson_sample_pairwise_inclusion() -> None:
    """Both units of a pair are in with probability q^2, in one step and in consecutive ones."""
    source, size, rate, draws = simulated("pairs"), 8, 0.2, 40_000
    included = np.zeros((draws, size))
    for row in included:
        row[source.poisson_sample(size, rate)] = 1
        source.gaussian((3,), 1.0)  # as between two steps
    error = math.sqrt(rate**2 * (1 - rate**2) / draws)
    same = included.T @ included / draws
    np.testing.assert_allclose(same[~np.eye(size, dtype=bool)], rate**2, atol=4 * error)
    following = included[:-1].T @ included[1:] / (draws - 1)
    np.testing.assert_allclose(following, rate**2, atol=4 * error)


def test_choose_is_uniform_over_subsets() -> None:
    """Marginal 3/5, pairwise 3/10, and every subset alike; groups in any order of positions."""
    source, draws = simulated("choose"), 20_000
    groups = np.array([7, 3, 7, 7, 3, 7, 7])  # five sevens, two threes
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        chosen = source.choose(groups, 3)
        assert chosen.dtype == np.int64
        assert {1, 4} <= set(chosen.tolist())  # the threes are within the cap
        sevens = tuple(i for i in chosen.tolist() if groups[i] == 7)
        counts[sevens] = counts.get(sevens, 0) + 1
    assert len(counts) == 10
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    for subset, expected in (((0,), 0.6), ((5,), 0.6), ((0, 2), 0.3), ((2, 6), 0.3)):
        share = sum(n for s, n in counts.items() if set(subset) <= set(s)) / draws
        assert share == pytest.approx(expected, abs=4 * math.sqrt(0.25 / draws))


def test_choose_edge_cases() -> None:
    source, groups = simulated("choose edges"), np.array([0, 0, 5, 5, 5])
    assert source.choose(groups, 3).tolist() == [0, 1, 2, 3, 4]
    assert source.choose(groups[:0], 1).tolist() == []
    for _ in range(20):
        first, second = source.choose(groups, 1).tolist()
        assert first in (0, 1) and second in (2, 3, 4)
    with pytest.raises(PrivacyError, match=r"most: found 0; .*at least 1.*records_per_unit"):
        source.choose(groups, 0)


def test_poisson_sample_edge_cases() -> None:
    source = simulated("edges")
    assert source.poisson_sample(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert source.poisson_sample(5, 0.0).tolist() == []
    assert source.poisson_sample(0, 0.5).tolist() == []
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(PrivacyError, match=r"rate: found .*a probability"):
            source.poisson_sample(5, rate)
    with pytest.raises(PrivacyError, match="size: found -1"):
        source.poisson_sample(-1, 0.5)


def test_simulation_is_reproducible_on_every_machine() -> None:
    # Golden: recorded with randomgen 2.5.0 and numpy 2.4.6.
    source = NoiseSource.for_simulation(1, "site-a")
    assert source.poisson_sample(20, 0.25).tolist() == [0, 3, 6, 13, 15]
    golden = [-0.07925329812800225, 0.8258775959426453, -1.2993933095344177]
    np.testing.assert_allclose(source.gaussian((3,), 1.0).numpy(), golden, rtol=1e-12)


def test_discrete_gaussian_has_the_stated_distribution() -> None:
    values = simulated("integers").discrete_gaussian(200_000, sampler(750.0))
    assert values.dtype == np.int64
    assert stats.kstest(values, "norm", args=(0, 750.0)).pvalue > 0.01
    assert values.var() / 750.0**2 == pytest.approx(1, abs=4 * math.sqrt(2 / values.size))


def test_discrete_gaussian_is_reproducible_in_a_simulation_only() -> None:
    # Golden: recorded with randomgen 2.5.0; integers only, so the same on every machine.
    golden = [26017, 59104, -58777, 21257]
    source = NoiseSource.for_simulation(1, "site-a")
    assert source.discrete_gaussian(4, sampler(1e5)).tolist() == golden
    assert not source.untouched
    again = NoiseSource.for_simulation(1, "site-a").discrete_gaussian(4, sampler(1e5))
    assert again.tolist() == golden
    one, two = (
        NoiseSource.from_operating_system().discrete_gaussian(4, sampler(1e5)) for _ in range(2)
    )
    assert one.tolist() != two.tolist()


def test_discrete_gaussian_and_gaussian_share_one_stream() -> None:
    """What one draw used is not used again by the next."""
    source = simulated("mixed")
    first = source.discrete_gaussian(50, sampler(200.0))
    source.gaussian((3,), 1.0)
    second = source.discrete_gaussian(50, sampler(200.0))
    assert first.tolist() != second.tolist()


def test_distinct_keys_give_distinct_streams() -> None:
    keys: list[tuple[int | str, ...]] = [(1, 2), (2, 1), (12,), ("1", "2"), ("12",), (1, 2, "")]
    first = {NoiseSource.for_simulation(*key).gaussian((1,), 1.0).item() for key in keys}
    assert len(first) == len(keys)
    assert NoiseSource.for_simulation(1, 2).gaussian((1,), 1.0).item() in first


def test_operating_system_sources_differ_and_say_what_they_are() -> None:
    one, two = NoiseSource.from_operating_system(), NoiseSource.from_operating_system()
    assert not torch.equal(one.gaussian((4,), 1.0), two.gaussian((4,), 1.0))
    assert not one.simulated
    assert NoiseSource.for_simulation(0).simulated


def test_a_forked_process_does_not_repeat_its_parent() -> None:
    source = NoiseSource.from_operating_system()

    def draw() -> bytes:
        return source.gaussian((4,), 1.0).numpy().tobytes()

    def draw_in_grandchild() -> bytes:
        return in_forked_child(draw)

    draws = [in_forked_child(draw), in_forked_child(draw), in_forked_child(draw_in_grandchild)]
    draws.append(draw())
    assert [len(each) for each in draws] == [32] * 4
    assert len(set(draws)) == 4


def test_a_forked_simulation_is_refused() -> None:
    source = simulated("fork")

    def draw() -> bytes:
        try:
            source.poisson_sample(10, 0.5)
        except PrivacyError as error:
            return str(error).encode()
        return b"drew"

    assert b"with a key of its own" in in_forked_child(draw)
    assert source.poisson_sample(10, 1.0).size == 10  # The parent goes on.


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_source_cannot_be_duplicated(duplicate: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="equal noise"):
        duplicate(simulated("copy"))
