"""`federation.toml`: where the server listens, what it allows, and the files beside it.

DIR/federation.toml             this file's subject
DIR/ca.pem, ca.key              the federation's own certificate authority
DIR/server.pem, server.key      what sites see (gateway, joining, backbone service)
DIR/superlink.pem, .key         for Flower's SuperLink, which only this machine may reach
DIR/operator.key, operator.pub  Ed25519: signs plans
DIR/registry.sqlite             invites, sites and their certificates
DIR/flower.sqlite, flower/      Flower's state and settings
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedgraft_common.atomic import write_atomically
from fedgraft_common.errors import ServerError
from fedgraft_common.invite import Port, join_address

Host = Annotated[str, Field(pattern=r"^[0-9A-Za-z.:-]{1,253}$")]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FederationTable(_Table):
    """Names."""

    name: str = Field(description="Shown to sites.", pattern=r"^[^\x00-\x1f\x7f]{1,64}$")
    host: Host = Field(description="Name or address by which sites reach this server.")


class GatewayTable(_Table):
    """The only way in for sites."""

    bind: Host = Field(default="0.0.0.0", description="Address to listen on.")  # noqa: S104 - the public side
    port: Port = Field(default=9443, description="For sites with a certificate.")
    join_port: Port = Field(default=9444, description="For joining, with an invite.")
    max_request_bytes: int = Field(
        default=16 * 2**20, ge=2**16, description="Bytes of one request body."
    )
    requests_per_second: float = Field(default=100.0, gt=0, description="Of one site, on average.")
    burst: int = Field(default=500, ge=1, description="Requests of one site at once.")
    max_connections: int = Field(default=1000, ge=1, description="Of all sites.")


class BackboneTable(_Table):
    """The service that hands out backbones."""

    port: Port = Field(
        default=9445, description="gRPC over mutual TLS, on the gateway's bind address."
    )
    total_bytes_per_second: int | None = Field(
        default=None, ge=1, description="To all sites together; unlimited without it."
    )
    site_bytes_per_second: int | None = Field(
        default=None, ge=1, description="To one site; unlimited without it."
    )


class SuperLinkTable(_Table):
    """Flower's server process, on 127.0.0.1 only."""

    port: Port = Field(
        default=9446,
        le=65534,
        description="And the one after it. Never open them to other machines: FLOWER.md says why.",
    )

    @property
    def fleet_port(self) -> int:
        """The neighbour, where Flower's Fleet calls can be made over gRPC."""
        return self.port + 1


class CertificatesTable(_Table):
    """How long certificates last; sites renew when a third of the time is left."""

    site_days: float = Field(
        default=90.0, gt=0, le=825, description="Days a site's certificate lasts."
    )


class MonitoringTable(_Table):
    """For whoever looks after this machine; on 127.0.0.1 only."""

    metrics_port: Port | None = Field(default=None, description="For Prometheus; none without it.")


class Settings(_Table):
    """All of federation.toml."""

    federation: FederationTable
    gateway: GatewayTable = GatewayTable()
    backbone: BackboneTable = BackboneTable()
    superlink: SuperLinkTable = SuperLinkTable()
    certificates: CertificatesTable = CertificatesTable()
    monitoring: MonitoringTable = MonitoringTable()

    @model_validator(mode="after")
    def _ports_differ(self) -> Settings:
        link = self.superlink
        ports = (
            self.gateway.port, self.gateway.join_port, self.backbone.port, link.port,
            link.fleet_port,
        )  # fmt: skip
        if len(set(ports)) < len(ports):
            raise ValueError(f"five different ports are needed, found {ports}")
        return self

    @property
    def gateway_address(self) -> str:
        """`host:port` for sites."""
        return join_address(self.federation.host, self.gateway.port)

    @property
    def backbone_address(self) -> str:
        """`host:port` for sites."""
        return join_address(self.federation.host, self.backbone.port)

    def to_toml(self) -> str:
        """As a file, every value written out, each with its description."""
        lines = ["# A Fedgraft federation server. Restart `fedgraft server up` after a change.", ""]
        for table, field in type(self).model_fields.items():
            content = getattr(self, table)
            lines.append(f"[{table}]  # {(field.annotation.__doc__ or '').strip()}")
            for key, description in type(content).model_fields.items():
                value = getattr(content, key)
                written = f"# {key} =" if value is None else f"{key} = {_literal(value)}"
                lines.append(f"{written}  # {description.description}")
            lines.append("")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class ServerDirectory:
    """A server's files, by name."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """federation.toml."""
        return self.path / "federation.toml"

    @property
    def ca(self) -> tuple[Path, Path]:
        """Certificate and key of the CA."""
        return self.path / "ca.pem", self.path / "ca.key"

    @property
    def server(self) -> tuple[Path, Path]:
        """Certificate and key shown to sites."""
        return self.path / "server.pem", self.path / "server.key"

    @property
    def superlink(self) -> tuple[Path, Path]:
        """Certificate and key of the SuperLink on loopback."""
        return self.path / "superlink.pem", self.path / "superlink.key"

    @property
    def operator(self) -> tuple[Path, Path]:
        """Public and private signing key."""
        return self.path / "operator.pub", self.path / "operator.key"

    def operator_private_key(self) -> Ed25519PrivateKey:
        """What plans and manifests are signed with.

        Raises:
            ServerError: missing, or another kind of key.
        """
        path = self.operator[1]
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            key, found = None, getattr(error, "strerror", None) or "no usable key"
        else:
            found = type(key).__name__
        if not isinstance(key, Ed25519PrivateKey):
            raise ServerError(
                str(path), found, "the operator's Ed25519 key in PEM",
                "Restore it from the backup of the server's directory.",
            )  # fmt: skip
        return key

    @property
    def runs(self) -> Path:
        """One directory for each run."""
        return self.path / "runs"

    @property
    def backbones(self) -> Path:
        """What the backbone service hands out."""
        return self.path / "backbones"

    @property
    def registry(self) -> Path:
        """Invites, sites and certificates."""
        return self.path / "registry.sqlite"

    @property
    def flower_state(self) -> Path:
        """Flower's runs and messages."""
        return self.path / "flower.sqlite"

    @property
    def flower_home(self) -> Path:
        """Flower's settings, away from those of the account."""
        return self.path / "flower"

    def write_settings(self, settings: Settings) -> None:
        """Replaces federation.toml."""
        write_atomically(self.settings_file, settings.to_toml().encode())

    def settings(self) -> Settings:
        """Reads federation.toml.

        Raises:
            ServerError: missing, not TOML, or a wrong value; names the first wrong key.
        """
        file = self.settings_file
        action = "Correct the file, or make a directory with `fedgraft server init DIR`."
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ServerError(str(file), "no such file", "a server directory", action) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ServerError(str(file), str(error), "a TOML file", action) from None
        try:
            return Settings.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "ports"
            found = first["input"] if first["loc"] else ""
            raise ServerError(f"{file}: {key}", found, first["msg"], action) from None


def _literal(value: object) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
