"""An invite: what a site operator is given to join a federation, as one printable string.

It names where to join and which CA to trust there (by the SHA-256 of its certificate), and it
carries a one-time secret. Whoever holds it can join once, in the invited name: send it the way a
password is sent.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import re
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedgraft_common.errors import IdentityError

_PREFIX: Final = "fedgraft-invite-1."
_ALLOWED: Final = f"the whole text that `fedgraft server invite` printed, from {_PREFIX} on"

SiteName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
"""Lower-case letters, digits and inner hyphens, at most 63: a DNS label."""
Port = Annotated[int, Field(ge=1, le=65535)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Invite(BaseModel):
    """What the string holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: SiteName = Field(description="The site's name in the federation.")
    host: str = Field(
        description="Name or address of the server.", pattern=r"^[0-9A-Za-z.:-]{1,253}$"
    )
    port: Port = Field(description="Port for joining.")
    ca_sha256: Sha256 = Field(description="SHA-256 of the CA certificate (DER), hexadecimal.")
    secret: str = Field(
        description="One-time secret, 256 random bits.", pattern=r"^[0-9A-Za-z_-]{43}$"
    )
    expires: dt.datetime = Field(description="UTC.")

    @property
    def address(self) -> str:
        """`host:port`, with brackets around an IPv6 address."""
        return join_address(self.host, self.port)

    def encode(self) -> str:
        """One line of letters, digits, `-`, `_` and `.`."""
        content = self.model_dump_json().encode()
        return _PREFIX + base64.urlsafe_b64encode(content).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Self:
        """Reads what `encode` made; white space from mail programs is ignored.

        Raises:
            IdentityError: anything else. The text is not repeated: it may hold a secret.
        """
        compact = re.sub(r"\s+", "", text)
        if not compact.startswith(_PREFIX):
            raise _unreadable("text that does not begin as an invite does")
        encoded = compact.removeprefix(_PREFIX)
        try:
            padded = encoded + "=" * (-len(encoded) % 4)
            content = base64.b64decode(padded, altchars=b"-_", validate=True)
            invite = cls.model_validate_json(content)
        except (ValidationError, ValueError, binascii.Error):
            raise _unreadable("damaged or incomplete text") from None
        if invite.expires.tzinfo is None:
            raise _unreadable("an expiry without a time zone")
        return invite


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _unreadable(found: str) -> IdentityError:
    return IdentityError("invite", found, _ALLOWED, "Copy it again, or ask for a new one.")
