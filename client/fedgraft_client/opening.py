"""From a site file to a Site that can answer: records read and checked, ledger opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedgraft_client.data import Records
from fedgraft_client.ledger import Ledger
from fedgraft_client.loaders import load
from fedgraft_client.runtime import Runtime
from fedgraft_client.secure_member import Membership
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.site_file import SiteFile, load_site_file
from fedgraft_client.store import SiteStore
from fedgraft_client.tasks import build_task
from fedgraft_common.errors import PolicyError
from fedgraft_common.plan import Plan


def open_site(
    path: Path,
    operator_key: Ed25519PublicKey | None = None,
    locate: Callable[[Plan], Path | None] = lambda _: None,
    membership: Membership | None = None,
) -> Site:
    """The site that a site file describes, with real randomness and its own ledger.

    Close its store when done: `site.store.close()`.

    Args:
        path: the site file.
        operator_key: signs the plans that are accepted.
        locate: fetches a plan's backbone; see `Runtime`.
        membership: for secure aggregation.

    Raises:
        PolicyError: the site file is wrong.
        DataError: the records cannot be used.
        LedgerError: the ledger is in use, damaged, or was rolled back.
    """
    file, base = load_site_file(path), path.parent
    records = load_records(file, base)
    if file.policy.maximum_delta * records.unit_count >= 1:
        raise PolicyError(
            f"{path}: policy.maximum_delta", file.policy.maximum_delta,
            "less than one over the units that the data really has",
            "Choose a smaller delta; this message stays here.",
        )  # fmt: skip
    held_out = None
    if file.data.held_out is not None:
        held_out = load_records(file, base, file.data.held_out)
    store = open_store(file, base)
    try:
        runtime = Runtime(file.device, file.physical_batch, locate, file.policy.gpu_memory)
        size = file.data.nominal_size
        config = SiteConfig(file.name, file.spec.classes, size, task=file.spec)
        return Site(
            config, records, runtime, store, file.policy,
            held_out=held_out, operator_key=operator_key, membership=membership,
        )  # fmt: skip
    except BaseException:
        store.close()
        raise


def open_store(file: SiteFile, base: Path) -> SiteStore:
    """The ledger and the heads of a site's data set.

    Raises:
        LedgerError: in use, damaged, or rolled back.
    """
    return SiteStore(
        file.store_directory(base),
        dataset=file.data.name,
        unit=file.data.unit,
        witness=file.witness_file(base),
    )


def recover_ledger(file: SiteFile, base: Path) -> Ledger:
    """Accepts an old ledger and charges what its witness knows to be missing.

    Raises:
        LedgerError: in use, or damaged beyond that.
    """
    return Ledger(
        file.store_directory(base),
        file.data.name,
        file.data.unit,
        file.witness_file(base),
        recover=True,
    )


def load_records(file: SiteFile, base: Path, source: str | None = None) -> Records:
    """Reads a site's records.

    Args:
        file: says where they are and what they mean.
        base: what relative paths are relative to.
        source: another source of the same form; None: the site's own.

    Raises:
        DataError: they cannot be read.
    """
    task = build_task(file.spec)
    scratch = file.store_directory(base)
    found = load(source or file.data.source, file.data, task, file.data.unit, base, scratch)
    return found.records
