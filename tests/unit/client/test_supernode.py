"""Which site a stock SuperNode is: its own configuration says so."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import Context, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from fedgraft_client import supernode
from fedgraft_common.errors import LinkError


def context(**config: str) -> Context:
    return Context(1, 5, UserConfig(config), RecordDict(), UserConfig())


def test_the_named_function_opens_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    module: Any = SimpleNamespace(open_site=lambda c: opened.append(c.node_id))
    monkeypatch.setitem(sys.modules, "my_hospital", cast(Any, module))
    supernode._opener.cache_clear()
    supernode.site_of_this_node(context(site="my_hospital:open_site"))
    assert opened == [5]
    assert isinstance(supernode.app, ClientApp)


@pytest.mark.parametrize("name", ["", "no_such_module:open", "pathlib:open_site", "pathlib"])
def test_anything_else_is_one_error(name: str) -> None:
    supernode._opener.cache_clear()
    with pytest.raises(LinkError) as caught:
        supernode.site_of_this_node(context(site=name))
    assert f"node-config site: found {name!r}; allowed: MODULE:FUNCTION" in str(caught.value)
