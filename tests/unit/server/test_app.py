"""The ServerApp's run configuration, and the bundle that carries it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from flwr.app import UserConfig
from flwr.serverapp import ServerApp
from flwr.supercore.object_ref import load_app

from fedgraft_common.errors import PlanError, ServerError
from fedgraft_common.plan import Plan
from fedgraft_server.app import read_run_config
from fedgraft_server.runs import STUB, Runs, stub

DEPLOY = Path(__file__).parents[3] / "deploy" / "flower_app"


def config(**changes: str) -> UserConfig:
    whole = {"plan": Plan().canonical, "directory": "/runs/7", "sites": "18446744073709551615,3"}
    return UserConfig(whole | changes)


def test_what_is_sent_is_what_is_read() -> None:
    plan, directory, sites = read_run_config(config())
    assert plan.hash == Plan().hash
    assert directory == Path("/runs/7")
    assert sites == {3, 2**64 - 1}  # beyond TOML's and JSON's numbers, so they travel as text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"plan": "{"}, "run configuration: plan: found '{'; allowed: a plan as canonical JSON"),
        ({"directory": ""}, "directory: found ''; allowed: a directory of the server"),
        ({"sites": "3,x"}, "sites: found '3,x'; allowed: node ids with commas between them"),
        ({"sites": ""}, "Start runs with `fedgraft run`"),
    ],
)
def test_a_wrong_configuration_is_one_error(changes: dict[str, str], text: str) -> None:
    with pytest.raises(ServerError) as caught:
        read_run_config(config(**changes))
    assert text in str(caught.value)


def test_a_wrong_plan_is_one_error() -> None:
    with pytest.raises(PlanError, match="run configuration: rounds"):
        read_run_config(config(plan='{"rounds": {"count": 0}}'))


def test_the_bundle_is_one_file_that_names_installed_code(tmp_path: Path) -> None:
    assert list(stub()) == [STUB]
    document = tomllib.loads(stub()[STUB].decode())
    assert document["project"]["dependencies"] == []
    assert "federations" not in document["tool"]["flwr"]
    keys = {*config(), "signature", "backbone", "ca", "registry"}
    assert set(document["tool"]["flwr"]["app"]["config"]) == keys
    named = document["tool"]["flwr"]["app"]["components"]["serverapp"]
    assert isinstance(load_app(named, RuntimeError, str(tmp_path)), ServerApp)


def test_the_deployed_stub_is_the_packaged_one() -> None:
    assert (DEPLOY / STUB).read_bytes() == stub()[STUB]


def test_the_control_api_is_spoken_to_on_loopback_only() -> None:
    with pytest.raises(ServerError, match="allowed: a loopback address"):
        Runs("192.0.2.1:8000")
    with Runs("127.0.0.1:1") as runs, pytest.raises(ServerError, match="fedgraft server up"):
        runs.all()
