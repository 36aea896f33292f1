"""An audit as one HTML file that opens offline, and as JSON; both under one signature.

    audit.json   {report, html_sha256, key, signature}: Ed25519 over the first three as canonical
                 JSON, so that neither file can be changed without its being noticed
    audit.html   the same for people; pictures are inside, nothing is fetched

The first screen is for someone who is not a specialist: whether it passed, what is promised, what
was measured, and what an audit like this cannot see.
"""

from __future__ import annotations

import hashlib
import json
import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedgraft_common.accounting import SamplingEvent
from fedgraft_common.atomic import write_atomically
from fedgraft_common.errors import AuditError
from fedgraft_common.plan import Plan
from fedgraft_common.signing import check_audit, sign_audit
from fedgraft_simulations.audit.ceiling import ceiling
from fedgraft_simulations.audit.part import Effort, PartResult, Verdict
from fedgraft_simulations.audit.parts import PARTS
from fedgraft_simulations.audit.rehearsal import Claim
from fedgraft_simulations.audit.selftest import SelfTest
from fedgraft_simulations.table import delta_words, epsilon_words

FORMAT = "fedgraft-audit-1"
BOUND = "epsilon_lower_bound"
"""The key of a part's facts that holds the largest epsilon it showed with confidence."""
FALSE_ALARM = 0.01


@dataclass(frozen=True, slots=True)
class Audit:
    """A finished audit.

    Attributes:
        plan: what was audited; None for a ledger or a self-test alone.
        claim: what it promises; None without a plan.
        parts: results, in the order in which they ran.
        self_test: if there was one.
        seed: of the auditor's randomness.
        effort: `quick` or `full`.
        finished: when, in UTC, as ISO 8601.
        seconds: how long it took.
    """

    plan: Plan | None
    claim: Claim | None
    parts: tuple[PartResult, ...]
    self_test: SelfTest | None
    seed: int
    effort: Effort
    finished: str
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """`fail` if anything did."""
        failed = any(part.verdict == "fail" for part in self.parts)
        if failed or (self.self_test is not None and not self.self_test.passed):
            return "fail"
        return "pass"

    @property
    def missing(self) -> tuple[str, ...]:
        """Parts that were not run."""
        done = {part.name for part in self.parts}
        return tuple(name for name in PARTS if name not in done)

    @property
    def measured(self) -> float | None:
        """The largest epsilon that any part showed with confidence."""
        found = [part.facts[BOUND] for part in self.parts if part.facts.get(BOUND) is not None]
        return max(found) if found else None

    def document(self) -> dict[str, Any]:
        """For machines."""
        plan, claim = self.plan, self.claim
        return {
            "format": FORMAT,
            "fedgraft": version("fedgraft"),
            "finished": self.finished,
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
            "effort": self.effort,
            "verdict": self.verdict,
            "plan": None if plan is None else {"hash": plan.hash, **plan.model_dump(mode="json")},
            "claim": None if claim is None else _finite(asdict(claim)),
            "measured": self.measured,
            "not_run": list(self.missing),
            "parts": [_part(part) for part in self.parts],
            "self_test": self.self_test.document() if self.self_test else None,
        }


def write_audit(audit: Audit, directory: Path, key: Ed25519PrivateKey) -> None:
    """Writes `audit.html` and `audit.json`, signed."""
    report = json.loads(canonical(audit.document()))  # what a reader will have
    public = key.public_key().public_bytes_raw().hex()
    digest = hashlib.sha256(canonical(report).encode()).hexdigest()
    html = _render(audit, public, digest).encode()
    signed = {
        "report": report,
        "html_sha256": hashlib.sha256(html).hexdigest(),
        "key": public,
    }
    signature = sign_audit(canonical(signed), key)
    document = json.dumps({**signed, "signature": signature}, indent=2, allow_nan=False)
    write_atomically(directory / "audit.html", html)
    write_atomically(directory / "audit.json", (document + "\n").encode())


def verify_audit(directory: Path, expected_key: str | None = None) -> dict[str, Any]:
    """Checks the signature on a report, and that its HTML file is the one that was signed.

    Args:
        directory: holds `audit.json` and `audit.html`.
        expected_key: the auditor's public key as the reader knows it, in hexadecimal.

    Returns:
        The report.

    Raises:
        AuditError: a file is missing or was altered, or somebody else signed.
    """
    path = directory / "audit.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        html = (directory / "audit.html").read_bytes()
        signature = document.pop("signature")
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(document["key"]))
        report: dict[str, Any] = document["report"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AuditError(
            str(path), str(error), "audit.json and audit.html, as `fedgraft audit` wrote them",
            "Name the directory that holds both.",
        ) from None  # fmt: skip
    check_audit(canonical(document), str(signature), key)
    if hashlib.sha256(html).hexdigest() != document["html_sha256"]:
        raise AuditError(
            str(directory / "audit.html"), "another file", "the one that was signed",
            "It was altered after it was signed; ask the auditor for the original.",
        )  # fmt: skip
    if expected_key not in (None, document["key"]):
        raise AuditError(
            f"{path}: key", document["key"], str(expected_key),
            "Somebody else signed this report; ask the auditor for the original.",
        )  # fmt: skip
    return report


def canonical(document: object) -> str:
    """JSON in the one form that is signed.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _part(part: PartResult) -> dict[str, Any]:
    found = asdict(part)
    found["figures"] = [
        {
            "title": figure.title,
            "caption": figure.caption,
            "sha256": hashlib.sha256(figure.png).hexdigest(),
        }
        for figure in part.figures
    ]
    found["seconds"] = round(part.seconds, 1)
    return found


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in facts.items()
    }


# -- words of the first screen


def headline(audit: Audit) -> str:
    """One sentence beside PASS or FAIL."""
    if audit.plan is None and audit.self_test is not None:
        return audit.self_test.words
    if audit.plan is None:
        return "The account holds." if audit.verdict == "pass" else "The account does not hold."
    if audit.claim is not None and math.isinf(audit.claim.epsilon):
        return "This plan protects nobody: it runs without differential privacy."
    if audit.verdict == "fail":
        failed = [part.title.lower() for part in audit.parts if part.verdict == "fail"]
        return f"The promise does not hold. What failed: {_listed(failed) or 'the self-test'}."
    if audit.missing:
        return "The promise holds in every part that was checked; not all were."
    return "The promise holds in everything that was checked."


def promise_words(audit: Audit) -> tuple[str, str]:
    """What is promised: for anyone, and for a specialist."""
    plan, claim = audit.plan, audit.claim
    if plan is None or claim is None:
        return (
            "Nothing that this audit was told: it looked at a site's own account of what was "
            "computed from one data set, and at nothing else.",
            "",
        )
    if math.isinf(claim.epsilon):
        return (
            "Nothing. Whoever sees what leaves a site may find out who is in its data.",
            "privacy.mechanism is none: epsilon is infinite.",
        )
    unit = unit_word(plan)
    event = SamplingEvent(claim.sample_rate, claim.noise_multiplier, claim.steps)
    found = float(ceiling([event], np.array([FALSE_ALARM]))[0])
    against = {
        "local": "the server, the other sites and anyone who gets the result",
        "distributed": "a server that sees only sums over all sites, the other sites and anyone "
        "who gets the result",
    }[plan.privacy.mechanism]
    plain = (
        f"Whoever sees all that leaves a site, and knows all its data but one {unit}, cannot "
        f"be sure whether that {unit} is in it: if they wrongly accuse no more than 1 of 100 who "
        f"are not, they find at most {found * 100:.0f} of 100 who are."
    )
    exact = (
        f"Epsilon {epsilon_words(claim.epsilon)} at delta {delta_words(claim.delta)} per {unit} "
        f"(add or remove), against {against}. Poisson sampling with q {claim.sample_rate:g}, noise "
        f"multiplier {claim.noise_multiplier:.4g}, {claim.steps} steps; accounted by PLD."
    )
    return plain, exact


def unit_word(plan: Plan | None) -> str:
    """What the plan protects: `patient_id` is the column of a patient."""
    return plan.privacy.unit.removesuffix("_id") if plan else "record"


def measured_words(audit: Audit) -> str:
    """What was measured, beside the promise."""
    if audit.plan is None and audit.parts:
        return " ".join(part.summary for part in audit.parts)
    if audit.measured is None or audit.claim is None:
        return "No part that measures a leak was run."
    bound = f"at least epsilon {audit.measured:.2f}, with 95 % confidence"
    if math.isinf(audit.claim.epsilon):
        return f"The strongest test shows a leak of {bound}. Nothing bounds it."
    if audit.measured > audit.claim.epsilon:
        return (
            f"The strongest test shows a leak of {bound}: more than the promised "
            f"{epsilon_words(audit.claim.epsilon)}."
        )
    return (
        f"The strongest test, which sees more than any real attacker, shows a leak of {bound}. Up "
        f"to {epsilon_words(audit.claim.epsilon)} is promised, so the promise stands."
    )


def not_covered_words(audit: Audit) -> list[str]:
    """The limits that matter most; each part has its own list besides."""
    found = []
    if audit.missing and audit.plan is not None:
        found.append(f"Parts that were not run: {_listed(list(audit.missing))}.")
    if audit.plan is not None and audit.plan.privacy.mechanism == "distributed":
        found.append(
            "Secure aggregation itself: the promise assumes that the server sees only sums."
        )
    if audit.parts and audit.plan is None:
        findings = [finding for part in audit.parts for finding in part.findings]
        if any(f.name == "earlier copy" and f.verdict == "info" for f in findings):
            found.append("Lines that were cut off at the end: name an earlier copy with --witness.")
        found.append("Whether what left the site was what its ledger was charged for.")
    if audit.plan is not None:
        found.append(
            "Real sites: this is a rehearsal of the plan on one machine, by the code that sites "
            "run. The ledger of a real site can be audited by itself."
        )
        found.append("What nobody has thought of: a test can refute a promise, and never prove it.")
    return found


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


def gauge(audit: Audit) -> dict[str, float] | None:
    """Where the measured bound and the promise lie on a bar, in percent of its length."""
    claim, measured = audit.claim, audit.measured
    if claim is None or measured is None or math.isinf(claim.epsilon):
        return None
    length = 1.12 * max(claim.epsilon, measured)
    return {"measured": 100 * measured / length, "promised": 100 * claim.epsilon / length}


def _render(audit: Audit, key: str, digest: str) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent.parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plain, exact = promise_words(audit)
    plan = audit.plan
    return environment.get_template("audit.html.j2").render(
        audit=audit,
        plan=plan,
        headline=headline(audit),
        promise=plain,
        exact=exact,
        unit=unit_word(plan),
        measured=measured_words(audit),
        not_covered=not_covered_words(audit),
        gauge=gauge(audit),
        epsilon=epsilon_words(audit.claim.epsilon) if audit.claim else "",
        pictures=lambda part: [(f, b64encode(f.png).decode()) for f in part.figures],
        words={"pass": "pass", "fail": "fail", "info": "note"},
        plan_json=json.dumps(plan.model_dump(mode="json"), indent=2) if plan else "",
        key=key,
        digest=digest,
        version=version("fedgraft"),
    )
