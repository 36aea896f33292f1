from __future__ import annotations

import inspect
import pickle

import pytest

from fedgraft_common import errors
from fedgraft_common.errors import FedgraftError, PlanError

TREE = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, FedgraftError)
]


@pytest.mark.parametrize("kind", TREE)
def test_text_says_field_value_allowed_and_action(kind: type[FedgraftError]) -> None:
    error = kind("privacy.epsilon", -1, "above 0", "Raise it.")
    assert str(error) == "privacy.epsilon: found -1; allowed: above 0. Raise it."
    assert (error.field, error.value, error.allowed) == ("privacy.epsilon", -1, "above 0")


def test_text_values_are_quoted_so_that_blanks_show() -> None:
    assert "found ' x\\n';" in str(PlanError("name", " x\n", "a name", "Rename."))


def test_what_a_server_sent_is_not_written_out_whole() -> None:
    error = PlanError("x" * 2**20, "y" * 2**20, "a name", "Rename.")
    assert len(str(error)) < 1200
    assert "(1,048,578 characters)" in str(error)  # with its quotes
    assert error.value == "y" * 2**20


@pytest.mark.parametrize("kind", TREE)
def test_docstring_draws_the_whole_tree(kind: type[FedgraftError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")


def test_survives_a_process_boundary() -> None:
    error = PlanError("seed", -1, "0 or more", "Choose another.")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(again) is PlanError
    assert str(again) == str(error)
