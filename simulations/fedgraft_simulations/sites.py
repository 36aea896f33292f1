"""The sites of a simulation: built from the plan, in whichever process needs them.

A `SimulatedSites` is only a plan and a directory, so it can be sent to another process (a Ray
actor); the records, the model and the caches are made there at the first message and stay warm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from fedgraft_client.runtime import Runtime
from fedgraft_client.secure_member import Membership
from fedgraft_client.site import Site, SiteConfig
from fedgraft_client.store import SiteStore
from fedgraft_common.plan import Plan
from fedgraft_common.site_signature import SiteKey, Trust
from fedgraft_simulations.partition import Share, partition
from fedgraft_simulations.throwaway_keys import kept_keys


@dataclass(frozen=True, slots=True)
class SimulatedSites:
    """Every site of a simulated federation.

    Attributes:
        plan: says which data and how they are spread.
        directory: the sites' stores are made below it.
        device: where sites train.
    """

    plan: Plan
    directory: Path
    device: str = "auto"

    def __call__(self, context: Context) -> Site:
        """The site that a message is for."""
        return self[int(context.node_config["partition-id"])]

    def __getitem__(self, number: int) -> Site:
        return _sites(self._key(), self.directory, self.device)[number]

    def all(self) -> list[Site]:
        """The sites in order."""
        return list(_sites(self._key(), self.directory, self.device))

    def shares(self) -> list[Share]:
        """What each site holds."""
        return list(_shares(self._key()))

    def trust(self) -> Trust:
        """Whose certificates count in this simulation."""
        return self._keys()[1]

    def _keys(self) -> tuple[dict[str, SiteKey], Trust]:
        names = [share.name for share in _shares(self._key())]
        return kept_keys(self.directory / "keys.json", names)

    def _key(self) -> str:
        """Mechanism and rounds do not change who holds what: variants share sites."""
        return self.plan.model_dump_json(
            include={
                "seed": True,
                "data": True,
                "sites": True,
                "privacy": {"unit": True, "secure_aggregation": True},
            }
        )


@lru_cache(maxsize=4)
def _shares(key: str) -> tuple[Share, ...]:
    return tuple(partition(Plan.model_validate_json(key)))


@lru_cache(maxsize=4)
def _sites(key: str, directory: Path, device: str) -> tuple[Site, ...]:
    plan = Plan.model_validate_json(key)
    runtime, unit = Runtime(device), plan.privacy.unit
    members: dict[str, Membership] = {}
    if plan.privacy.secure_aggregation == "real":
        keys, trust = kept_keys(directory / "keys.json", [share.name for share in _shares(key)])
        members = {name: Membership(mine, lambda: trust) for name, mine in keys.items()}
    return tuple(
        Site(
            SiteConfig(
                share.name, share.classes, share.train.unit_count, simulated=True, task=share.spec
            ),
            share.train,
            runtime,
            SiteStore(directory / share.name, durable=False, unit=unit),
            held_out=share.test,
            membership=members.get(share.name),
        )
        for share in _shares(key)
    )
