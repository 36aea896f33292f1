from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgraft_common.errors import AuditError
from fedgraft_common.plan import parse_plan
from fedgraft_simulations.audit.charts import bounds_chart
from fedgraft_simulations.audit.part import Figure, Finding, PartResult, Verdict
from fedgraft_simulations.audit.rehearsal import Claim
from fedgraft_simulations.audit.report import (
    Audit,
    gauge,
    headline,
    measured_words,
    not_covered_words,
    promise_words,
    verify_audit,
    write_audit,
)
from fedgraft_simulations.audit.selftest import Case, SelfTest

KEY = Ed25519PrivateKey.generate()
HOSTILE = "<script>alert(1)</script>"


def part(
    name: str = "mechanism", verdict: Verdict = "pass", bound: float | None = 4.0
) -> PartResult:
    return PartResult(
        name, f"The {name}", verdict, f"Summary of {name}.",
        (Finding("It holds", "it did", verdict, HOSTILE, "check"),),
        (Figure("A figure", "How to read it.", bounds_chart([("noise", 4.0, 5.0)], 7.99)),),
        {"epsilon_lower_bound": bound, "other": 1}, ("The moon.",), 1.0,
    )  # fmt: skip


def audit(
    parts: tuple[PartResult, ...] = (part(),), epsilon: float = 7.981,
    mechanism: str = "distributed", self_test: SelfTest | None = None,
) -> Audit:  # fmt: skip
    plan = parse_plan(
        {
            "name": "wards", "training": {"sample_rate": 0.5},
            "privacy": {"mechanism": mechanism}, "aggregation": {"sites": 16},
        },
        "test",
    )  # fmt: skip
    sigma = 0.0 if math.isinf(epsilon) else 2.47
    claim = Claim(epsilon, 1e-5, 0.5, sigma, 60, 1.0)
    return Audit(plan, claim, parts, self_test, 3, "full", "2026-01-02T03:04:05+00:00", 12.0)


def a_self_test(caught: bool = True, alarm: bool = False) -> SelfTest:
    bug = Case("no noise", "No noise.", {"mechanism": ("noise",) if caught else ()}, 1.0)
    sound = Case("sound", "", {"mechanism": ("noise",) if alarm else ()}, 1.0)
    return SelfTest((bug,), (sound, sound))


class Page(HTMLParser):
    """Collects what a page would fetch or run, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(found: Audit, directory: Path) -> Page:
    write_audit(found, directory, KEY)
    page = Page()
    page.feed((directory / "audit.html").read_text(encoding="utf-8"))
    return page


def test_the_first_screen_of_a_pass_says_promise_measure_and_limits(tmp_path: Path) -> None:
    page = page_of(audit(), tmp_path)
    text = " ".join(" ".join(page.text).split())
    first = text[: text.index("Summary of mechanism")]
    assert "PASS" in first
    assert "7.99" in first  # rounded up, never down
    assert "at least epsilon 4.00" in first
    assert re.search(r"at most \d+ of 100 who are", first)
    assert "Secure aggregation itself" in first
    assert "membership" in first  # a part that was not run
    assert "7.98" not in first


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    page = page_of(audit(), tmp_path)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "script" not in page.tags and "link" not in page.tags
    html = (tmp_path / "audit.html").read_text()
    assert HOSTILE not in html and "&lt;script&gt;" in html
    assert "default-src 'none'" in html


@pytest.mark.parametrize(
    ("found", "verdict", "says"),
    [
        (audit((part(), part("ledger", "fail"))), "fail", "What failed: the ledger"),
        (audit((part(bound=9.0),)), "pass", "not all were"),
        (audit((part(verdict="fail"),), math.inf, "none"), "fail", "protects nobody"),
        (audit(self_test=a_self_test(caught=False)), "fail", "self-test"),
        (audit(self_test=a_self_test(alarm=True)), "fail", "self-test"),
    ],
)
def test_headlines(found: Audit, verdict: str, says: str) -> None:
    assert found.verdict == verdict
    assert says in headline(found)


def test_a_self_test_alone_has_a_report_too(tmp_path: Path) -> None:
    alone = Audit(None, None, (), a_self_test(), 0, "full", "2026-01-02T03:04:05+00:00", 1.0)
    assert headline(alone) == "1 of 1 planted bugs caught, 0 false alarms in 2 sound runs."
    text = " ".join(page_of(alone, tmp_path).text)
    assert "mechanism: noise" in text and "0 false alarms in 2 runs" in text
    assert verify_audit(tmp_path)["self_test"]["passed"] is True


def test_a_ledger_alone_promises_nothing_and_measures_nothing(tmp_path: Path) -> None:
    alone = Audit(None, None, (part("ledger", bound=None),), None, 0, "full", "2026-01-02T03", 1.0)
    text = " ".join(" ".join(page_of(alone, tmp_path).text).split())
    assert "The account holds." in text
    assert "of a site’s ledger" in text
    assert "What was measured Summary of ledger." in text
    assert "Epsilon says" not in text
    assert "at most" not in text


def test_without_dp_nothing_is_promised() -> None:
    found = audit(epsilon=math.inf, mechanism="none")
    assert promise_words(found)[0].startswith("Nothing.")
    assert "Nothing bounds it" in measured_words(found)
    assert gauge(found) is None


def test_a_bound_above_the_promise_is_said_and_drawn_to_be() -> None:
    found = audit((part(bound=9.0),))
    assert "more than the promised 7.99" in measured_words(found)
    drawn = gauge(found)
    assert drawn is not None and drawn["promised"] < drawn["measured"] < 100


def test_the_local_mechanism_rests_on_nobody() -> None:
    assert not any("aggregation" in w for w in not_covered_words(audit(mechanism="local")))


def test_the_signature_covers_both_files(tmp_path: Path) -> None:
    write_audit(audit(), tmp_path, KEY)
    public = KEY.public_key().public_bytes_raw().hex()
    report = verify_audit(tmp_path, public)
    assert (report["verdict"], report["measured"]) == ("pass", 4.0)
    with pytest.raises(AuditError, match="Somebody else"):
        verify_audit(tmp_path, "00" * 32)

    page = tmp_path / "audit.html"
    before = page.read_bytes()
    page.write_bytes(before.replace(b"PASS", b"pass"))
    with pytest.raises(AuditError, match=r"audit\.html"):
        verify_audit(tmp_path)
    page.write_bytes(before)
    verify_audit(tmp_path)

    file = tmp_path / "audit.json"
    document = json.loads(file.read_text())
    document["report"]["measured"] = 0.1
    file.write_text(json.dumps(document))
    with pytest.raises(AuditError, match="signature"):
        verify_audit(tmp_path)
    file.unlink()
    with pytest.raises(AuditError, match=r"audit\.json"):
        verify_audit(tmp_path)


def test_equal_audits_give_equal_pages(tmp_path: Path) -> None:
    write_audit(audit(), tmp_path / "a", KEY)
    write_audit(audit(), tmp_path / "b", KEY)
    for name in ("audit.html", "audit.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
