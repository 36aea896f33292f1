"""Another object in the place of one of the program's own, for a while.

Audits watch and break the production code where it runs; nothing in that code knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_INHERITED = object()


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Puts `value` where `owner.name` is (a module or a class), and takes it away at the end."""
    before = vars(owner).get(name, _INHERITED)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
