"""A plan is what the operator signed, or it is refused."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgraft_common.errors import PlanError
from fedgraft_common.plan import Plan
from fedgraft_common.signing import check_signature, sign_plan

KEY = Ed25519PrivateKey.generate()
PLAN = Plan()


def test_a_signed_plan_passes() -> None:
    check_signature(PLAN.canonical, sign_plan(PLAN.canonical, KEY), KEY.public_key())


@pytest.mark.parametrize(
    ("text", "signature"),
    [
        (PLAN.replace({"privacy.epsilon": 9}).canonical, sign_plan(PLAN.canonical, KEY)),
        (PLAN.canonical + " ", sign_plan(PLAN.canonical, KEY)),
        (PLAN.canonical, sign_plan(PLAN.canonical, Ed25519PrivateKey.generate())),
        (PLAN.canonical, KEY.sign(PLAN.canonical.encode()).hex()),  # signed as something else
        (PLAN.canonical, ""),
        (PLAN.canonical, "ä"),
        (PLAN.canonical, "00" * 64),
    ],
)
def test_anything_else_is_refused(text: str, signature: str) -> None:
    with pytest.raises(PlanError, match="the federation operator's"):
        check_signature(text, signature, KEY.public_key())
