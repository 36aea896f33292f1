"""A site whose ledger was put back from a copy never says a second thing under the same masks."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from itertools import combinations
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message

from fedgraft_client.app import client_app
from fedgraft_client.ledger import Ledger
from fedgraft_client.policy import Policy
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_common.messages import ADAPTER, MESSAGE, SECURE, SecureStep, Status, read_status
from fedgraft_common.plan import Plan
from fedgraft_common.secure_messages import Answer, Question, to_bits
from fedgraft_server.federation import run_federation
from fedgraft_simulations.local_grid import LocalGrid
from fedgraft_simulations.sites import SimulatedSites

SITES, ROUNDS = 4, 2
PLAN = Plan().replace(
    {
        "adapter.method": "film",
        "adapter.layers": "last:1",
        "privacy.mechanism": "distributed",
        "privacy.tolerated_dropouts": 1,
        "training.sample_rate": 0.5,
        "training.expected_batch": 8.0,
        "aggregation.sites": SITES,
        "sites.count": SITES,
        "data.test_fraction": 0.96,
        "rounds.count": ROUNDS,
    }
)
POLICY = Policy(mechanisms=("distributed",), maximum_epsilon=1e3, minimum_noise_multiplier=1e-3)
UNMASK = SecureStep.UNMASK.message_type
Said = dict[tuple[str, int], set[bytes]]
"""What a site gave as masked inputs ("train") and named as survivors ("unmask"), by round."""


class Federation:
    """Site 0 is durable, with a witness; the others are simulated.

    Attributes:
        asked: every message to site 0, as it came.
        copies: of its ledger, one after each entry.
        witness: as it is in the end.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sites = SimulatedSites(PLAN, directory / "sites", "cpu")
        self.asked: list[Message] = []
        self.copies: list[Path] = []
        self.said: Said = {}
        site = self.opened(directory / "real")
        self.app = client_app(lambda _: site)
        rest = client_app(self.sites)

        def answer(message: Message, context: object) -> Message:
            if message.metadata.dst_node_id != 1:
                return rest(message, context)  # type: ignore[arg-type]
            self.asked.append(deepcopy(message))
            reply = self.app(message, context)  # type: ignore[arg-type]
            note(self.said, message, reply)
            return reply

        grid = LocalGrid(answer, SITES)  # type: ignore[arg-type]
        append = Ledger._append

        def copied(ledger: Ledger, *arguments: object) -> object:
            entry = append(ledger, *arguments)  # type: ignore[arg-type]
            if ledger is site.store.ledger:
                self.copies.append(directory / f"copy-{entry.seq:02d}.sqlite3")
                with (
                    closing(sqlite3.connect(self.copies[-1])) as copy,
                    closing(sqlite3.connect(ledger.path)) as original,
                ):
                    original.backup(copy)
            return entry

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ledger, "_append", copied)
            run_federation(
                PLAN, grid, directory / "server", lambda _: None, durable=False,
                trust=self.sites.trust,
            )  # fmt: skip
        site.store.close()
        self.witness = (directory / "real" / "ledger.witness").read_bytes()
        self.context = grid._contexts[1]

    def opened(self, home: Path) -> Site:
        """The site with real data, its noise from the operating system."""
        like = self.sites[0]
        config = SiteConfig("north", like.config.classes, 30, task=like.config.task)
        store = SiteStore(home, dataset="digits")
        return Site(
            config, like.records, like.runtime, store, POLICY, membership=like.membership
        )  # fmt: skip

    def put_back(self, copy: Path, home: Path, witness: bytes | None) -> None:
        """A new disk: the copy of the ledger, its key, and a witness."""
        home.mkdir(mode=0o700, exist_ok=True)
        for old in home.glob("ledger.sqlite3*"):
            old.unlink()
        (home / "ledger.sqlite3").write_bytes(copy.read_bytes())
        key = self.directory / "real" / "ledger.key"
        (home / "ledger.key").write_bytes(key.read_bytes())
        (home / "ledger.witness").unlink(missing_ok=True)
        if witness is not None:
            (home / "ledger.witness").write_bytes(witness)

    def recover(self, home: Path) -> None:
        """`fedgraft ledger recover`."""
        Ledger(home, "digits", recover=True).close()

    def ask_again(self, home: Path) -> Said:
        """What the site says to all that the server asked it, and to every other question."""
        site = self.opened(home)
        said: Said = {}
        app = client_app(lambda _: site)
        for original in self.asked:
            for message in (original, *others(original)):
                message = deepcopy(message)
                note(said, message, app(message, self.context))
        site.store.close()
        return said


def others(message: Message) -> Iterator[Message]:
    """The same question about all other sets of survivors that are large enough."""
    if message.metadata.message_type != UNMASK:
        return
    asked = Question.from_bytes(bytes(message.content.config_records[SECURE][MESSAGE]))  # type: ignore[arg-type]
    for size in (SITES - 1, SITES):
        for survivors in combinations(range(SITES), size):
            other = deepcopy(message)
            bits = to_bits(survivors, SITES)
            question = Question(asked.roster, asked.round, bits).to_bytes()
            other.content[SECURE] = ConfigRecord({MESSAGE: question})
            yield other


def note(said: Said, message: Message, reply: Message) -> None:
    """Keeps what a reply says about an input or about survivors."""
    if read_status(reply) is not Status.OK:
        return
    number = message.content.config_records["plan"]["round"]
    assert isinstance(number, int)
    if message.metadata.message_type == UNMASK:
        answer = Answer.from_bytes(bytes(reply.content.config_records[SECURE][MESSAGE]))  # type: ignore[arg-type]
        said.setdefault(("unmask", number), set()).add(answer.statement.survivors)
    elif message.metadata.message_type == "train":
        arrays = reply.content.array_records[ADAPTER]
        masked = b"".join(arrays[name].data for name in sorted(arrays))
        said.setdefault(("train", number), set()).add(masked)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.CRITICAL):
        yield


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("federation"))


def contradicts(first: Said, second: Said) -> list[tuple[str, int]]:
    """Rounds with a second input, or a second list of survivors."""
    return [what for what, words in second.items() if len(words | first[what]) > 1]


def test_the_newest_ledger_repeats_itself(federation: Federation, tmp_path: Path) -> None:
    """What the other tests ask does get an answer where nothing was lost."""
    assert all(len(words) == 1 for words in federation.said.values())
    federation.put_back(federation.copies[-1], tmp_path, federation.witness)
    said = federation.ask_again(tmp_path)
    assert set(federation.said) == said.keys() | {("train", 1)}  # only the newest input is kept
    assert all(federation.said[what] == words for what, words in said.items())


def test_never_a_second_input_and_never_a_second_list(
    federation: Federation, tmp_path: Path
) -> None:
    """A copy taken after each single entry, put back and recovered."""
    assert len(federation.copies) >= 9
    for place, copy in enumerate(federation.copies):
        home = tmp_path / f"{place}"
        federation.put_back(copy, home, federation.witness)
        federation.recover(home)
        said = federation.ask_again(home)
        assert not contradicts(federation.said, said), copy.name
        assert not any(what == "unmask" for what, _ in said), copy.name


def test_nor_if_the_witness_was_lost_and_found_again(
    federation: Federation, tmp_path: Path
) -> None:
    for place, copy in enumerate(federation.copies[2::2]):
        home = tmp_path / f"{place}"
        federation.put_back(copy, home, None)
        federation.recover(home)
        said = federation.ask_again(home)
        assert not contradicts(federation.said, said), copy.name
        (home / "ledger.witness").write_bytes(federation.witness)
        federation.recover(home)
        said = federation.ask_again(home)
        assert not contradicts(federation.said, said), copy.name


@pytest.mark.parametrize("behind", [0, 1, 2, 3])
def test_nor_if_the_witness_is_an_old_one_too(
    federation: Federation, tmp_path: Path, behind: int
) -> None:
    """Recovery gives up what it cannot know to be the newest, also where the two agree."""
    for place in (6, 8):
        home = tmp_path / f"{place}"
        lines = federation.witness.splitlines(keepends=True)
        seen = int(federation.copies[place].stem.removeprefix("copy-")) - behind
        federation.put_back(federation.copies[place], home, b"".join(lines[:seen]))
        federation.recover(home)
        assert not contradicts(federation.said, federation.ask_again(home))
