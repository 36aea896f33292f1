from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fedgraft_common.errors import PlanError
from fedgraft_common.plan import LATER_TABLES, Plan, load_plan, parse_override, parse_plan

SECTIONS: dict[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Plan.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
SIMULATION_ONLY = {"data", "sites", "comparison"}
DISTRIBUTED = {"privacy.mechanism": "distributed", "training.sample_rate": 0.5}

# What some fields need beside them.
START = {"adapter.start": "earlier/adapter", "adapter.start_sha256": "1" * 64}
NEEDED: dict[str, dict[str, object]] = {
    "adapter.start": dict(START),
    "adapter.start_sha256": dict(START),
    "training.proximal": {"training.local_steps": 2},
}
# One other valid value for every field that the hash covers.
CHANGES: dict[str, object] = {
    "name": "other",
    "seed": 1,
    "backbone.source": "embedded:other",
    "backbone.sha256": "0" * 64,
    "backbone.manifest_sha256": "0" * 64,
    "privacy.secure_aggregation": "summed",
    "adapter.tokens": 4,
    "backbone.weights": "other.safetensors",
    "backbone.options": {"in_chans": 1},
    "backbone.preprocessing": {"size": 64},
    "backbone.modality": "image-text",
    "backbone.pooling": "mean",
    "backbone.frozen_dtype": "float32",
    "adapter.method": "film",
    "adapter.rank": 4,
    "adapter.alpha": 8.0,
    "adapter.layers": "last:2",
    "adapter.targets": ["query"],
    "adapter.start": "runs/earlier/adapter",
    "adapter.start_sha256": "0" * 64,
    "head.training": "private",
    "head.start_noise": 4.0,
    "head.prompt": "an X-ray of {}",
    "head.local_affine": True,
    "head.scale": 2.0,
    "training.class_weights": {"ill": 2.0},
    "training.expected_batch": 12.0,
    "training.sample_rate": 0.5,
    "training.local_steps": 3,
    "training.learning_rate": 0.5,
    "training.schedule": "constant",
    "training.head_learning_rate": 0.5,
    "training.weight_decay": 0.1,
    "training.proximal": 0.1,
    "training.dropout": 0.1,
    "training.alignment": 0.1,
    "augmentation.views": 4,
    "augmentation.flip": True,
    "augmentation.shift": 0.0,
    "augmentation.rotate": 0.0,
    "augmentation.zoom": 0.0,
    "augmentation.brightness": 0.0,
    "augmentation.contrast": 0.0,
    "augmentation.noise": 0.1,
    "privacy.mechanism": "none",
    "privacy.epsilon": 2.0,
    "privacy.delta": 1e-6,
    "privacy.clipping_norm": 0.5,
    "privacy.unit": "patient_id",
    "privacy.records_per_unit": 4,
    "evaluation.every": 5,
    "evaluation.noise_multiplier": 3.0,
    "privacy.tolerated_dropouts": 1,
    "privacy.tolerated_colluders": 2,
    "aggregation.strategy": "FedAvgM",
    "aggregation.options": {"server_momentum": 0.9},
    "aggregation.sites": 7,
    "aggregation.minimum_sites": 3,
    "rounds.count": 2,
    "rounds.deadline": 10.0,
}


def hashed_fields() -> set[str]:
    plain = {name for name in Plan.model_fields if name not in SECTIONS}
    inner = {
        f"{s}.{f}" for s in SECTIONS.keys() - SIMULATION_ONLY for f in SECTIONS[s].model_fields
    }
    return plain | inner


# --- what is refused, and what the text says


@pytest.mark.parametrize(
    ("document", "field", "found", "allowed"),
    [
        ({"privacy": {"epsilonn": 3}}, "privacy.epsilonn", "3", "one of clipping_norm, delta"),
        ({"privcy": {}}, "privcy", "{}", "one of adapter, aggregation, augmentation"),
        ({"privacy": {"epsilon": 0}}, "privacy.epsilon", "0", "greater than 0"),
        ({"privacy": {"epsilon": -2.5}}, "privacy.epsilon", "-2.5", "greater than 0"),
        ({"privacy": {"epsilon": float("nan")}}, "privacy.epsilon", "nan", "finite number"),
        ({"privacy": {"epsilon": float("inf")}}, "privacy.epsilon", "inf", "finite number"),
        ({"privacy": {"epsilon": "eight"}}, "privacy.epsilon", "'eight'", "valid number"),
        ({"privacy": {"delta": 1.0}}, "privacy.delta", "1.0", "less than 1"),
        ({"training": {"sample_rate": 1.5}}, "training.sample_rate", "1.5", "equal to 1"),
        ({"training": {"sample_rate": 0}}, "training.sample_rate", "0", "greater than 0"),
        ({"training": {"expected_batch": 0}}, "training.expected_batch", "0", "greater than 0"),
        ({"rounds": {"count": 0}}, "rounds.count", "0", "greater than or equal to 1"),
        ({"privacy": {"unit": "patient id"}}, "privacy.unit", "'patient id'", "match pattern"),
        ({"privacy": {"unit": ""}}, "privacy.unit", "''", "match pattern"),
        ({"privacy": {"unit": "id\n"}}, "privacy.unit", r"'id\n'", "match pattern"),
        ({"privacy": {"clipping_norm": 1e-44}}, "privacy.clipping_norm", "1e-44", "equal to 0.001"),
        ({"privacy": {"clipping_norm": 1e30}}, "privacy.clipping_norm", "1e+30", "equal to 1000"),
        ({"training": {"learning_rate": 1e39}}, "training.learning_rate", "1e+39", "equal to 1"),
        ({"privacy": {"records_per_unit": 0}}, "privacy.records_per_unit", "0", "equal to 1"),
        ({"seed": 2**63}, "seed", str(2**63), "less than"),
        ({"name": "Two Words"}, "name", "'Two Words'", "match pattern"),
        ({"backbone": {"source": "hub:x"}}, "backbone.source", "'hub:x'", "match pattern"),
        ({"backbone": {"sha256": "abc"}}, "backbone.sha256", "'abc'", "match pattern"),
    ],
)
def test_error_names_field_value_and_what_is_allowed(
    document: dict[str, Any], field: str, found: str, allowed: str
) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan(document, origin="plan.toml")
    text = str(caught.value)
    assert text.startswith(f"plan.toml: {field}: found {found}; allowed: ")
    assert allowed in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (DISTRIBUTED | {"aggregation.strategy": "Krum"}, "use one of FedAvg, FedAvgM"),
        ({"privacy.mechanism": "distributed"}, "training.sample_rate is missing"),
        (DISTRIBUTED | {"training.local_steps": 2}, "training.local_steps=2"),
        (DISTRIBUTED | {"adapter.method": "none"}, "leaves nothing to aggregate"),
        ({"sites.label_sets": ["odd"]}, "'odd', which data.label_sets does not define"),
    ],
)
def test_plan_that_contradicts_itself(changes: dict[str, object], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        Plan().replace(changes)


def test_more_sites_needed_than_there_are() -> None:
    """Flower would wait for them for ever."""
    with pytest.raises(PlanError, match="minimum_sites"):
        Plan().replace({"aggregation.sites": 1, "aggregation.minimum_sites": 2})


# --- the canonical form and its hash


def test_default_is_the_hash_of_the_canonical_form() -> None:
    plan = Plan()
    assert plan.hash == hashlib.sha256(plan.canonical.encode()).hexdigest()
    hashed = Plan.model_fields.keys() - SIMULATION_ONLY
    assert json.loads(plan.canonical).keys() == hashed - set(LATER_TABLES)
    every = plan.replace({"augmentation.views": 2})
    assert json.loads(every.canonical).keys() == hashed
    assert (
        plan.replace({"privacy.tolerated_colluders": 0}).hash  # the default that it once was
        == "e7d329fdfd9b04068fc1718c132a0b372fa62512c0dfb3feaa1850c58dc7362c"
    )  # also what it was before those tables


def test_hash_does_not_depend_on_the_order_of_keys() -> None:
    options = {"options": {"server_momentum": 0.9, "server_learning_rate": 0.5}}
    reversed_options = {"options": dict(reversed(options["options"].items()))}
    one = {"privacy": {"epsilon": 2, "delta": 1e-6}, "seed": 3, "aggregation": options}
    other = {"aggregation": reversed_options, "seed": 3, "privacy": {"delta": 1e-6, "epsilon": 2.0}}
    assert parse_plan(one, "a").hash == parse_plan(other, "b").hash


@pytest.mark.parametrize(
    "changes",
    [
        {"data.source": "npz:x.npz"},
        {"data.label_sets": {"odd": [[1], [2]]}},
        {"sites.count": 3},
        {"comparison.local": {"training.learning_rate": 0.5}},
        {"sites.partitioner": "IidPartitioner", "sites.options": {}},
    ],
)
def test_hash_does_not_depend_on_the_simulation(changes: dict[str, object]) -> None:
    assert Plan().replace(changes).hash == Plan().hash


def test_every_hashed_field_has_a_change() -> None:
    assert CHANGES.keys() == hashed_fields()


@pytest.mark.parametrize("field", CHANGES)
def test_hash_depends_on_every_other_field(field: str) -> None:
    base = Plan().replace(NEEDED.get(field, {}))
    assert base.replace({field: CHANGES[field]}).hash != base.hash


def fractions(maximum: float) -> st.SearchStrategy[float]:
    return st.floats(0, maximum, exclude_min=True)


names = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
documents = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True),
        "seed": st.integers(0, 2**63 - 1),
        "adapter": st.fixed_dictionaries(
            {},
            optional={
                "rank": st.integers(1, 1024),
                "layers": st.text() | st.lists(names),
                "targets": st.just("auto") | st.lists(names),
            },
        ),
        "training": st.fixed_dictionaries(
            {}, optional={"sample_rate": fractions(1), "expected_batch": fractions(1e6)}
        ),
        "privacy": st.fixed_dictionaries(
            {},
            optional={
                "mechanism": st.sampled_from(["local", "none"]),
                "epsilon": fractions(1e3),
                "delta": st.floats(0, 1, exclude_min=True, exclude_max=True),
            },
        ),
        "aggregation": st.fixed_dictionaries(
            {},
            optional={
                "options": st.dictionaries(
                    names,
                    st.text()
                    | st.integers()
                    | st.booleans()
                    | st.floats(allow_nan=False, allow_infinity=False),
                ),
                "sites": st.none() | st.integers(2, 1000),
            },
        ),
    },
)


@given(documents)
def test_round_trip_through_the_canonical_form(document: dict[str, Any]) -> None:
    plan = parse_plan(document, origin="test")
    again = parse_plan(json.loads(plan.canonical), origin="request")
    assert again == plan
    assert again.hash == plan.hash
    for key, value in document.items():  # and nothing was changed on the way in
        if key in SECTIONS:
            section = getattr(plan, key).model_dump(mode="json")
            assert {field: section[field] for field in value} == value
        else:
            assert getattr(plan, key) == value


# --- changing a plan


def test_replace_validates_and_leaves_the_original() -> None:
    plan = Plan()
    assert plan.replace({"privacy.epsilon": 2}).privacy.epsilon == 2.0
    assert plan.privacy.epsilon == 8.0
    with pytest.raises(PlanError, match=r"privacy\.epsilon: found -1"):
        plan.replace({"privacy.epsilon": -1})
    with pytest.raises(PlanError, match=r"privacy\.epsilom: found 1; allowed: one of"):
        plan.replace({"privacy.epsilom": 1})
    with pytest.raises(PlanError, match="a key inside a table"):
        plan.replace({"name.first": "x"})


def test_a_plan_is_frozen() -> None:
    plan = Plan()
    with pytest.raises(ValidationError, match="frozen"):
        plan.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        plan.privacy.epsilon = 1e9


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("privacy.epsilon=2", "privacy.epsilon", 2),
        ("privacy.epsilon = 2.5", "privacy.epsilon", 2.5),
        ("adapter.layers=last:2", "adapter.layers", "last:2"),
        ('adapter.layers=["a.0", "a.1"]', "adapter.layers", ["a.0", "a.1"]),
        (
            "aggregation.options={server_momentum=0.9}",
            "aggregation.options",
            {"server_momentum": 0.9},
        ),
        ("x=true", "x", True),
        ("data.source=npz:/a=b.npz", "data.source", "npz:/a=b.npz"),
        ("x=", "x", ""),
    ],
)
def test_override(text: str, key: str, value: object) -> None:
    found = parse_override(text)
    assert found == (key, value)
    assert type(found[1]) is type(value)


@pytest.mark.parametrize("text", ["privacy.epsilon", "=2", "  =2"])
def test_override_without_key_or_value(text: str) -> None:
    with pytest.raises(PlanError, match=r"--set: found .* allowed: KEY=VALUE"):
        parse_override(text)


# --- files


def test_load(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text("seed = 3\n[privacy]\nepsilon = 2\n", encoding="utf-8")
    plan = load_plan(file, ["privacy.delta=1e-6", "training.sample_rate=0.25"])
    assert (plan.seed, plan.privacy.epsilon, plan.privacy.delta) == (3, 2.0, 1e-6)
    assert plan.training.sample_rate == 0.25
    with pytest.raises(PlanError, match=r"plan\.toml: privacy\.epsilon: found 'many'"):
        load_plan(file, ["privacy.epsilon=many"])


@pytest.mark.parametrize(
    ("content", "allowed"), [(b"seed = = 3", "TOML in UTF-8"), (b"\xff\xfe", "TOML in UTF-8")]
)
def test_load_something_else(tmp_path: Path, content: bytes, allowed: str) -> None:
    file = tmp_path / "plan.toml"
    file.write_bytes(content)
    with pytest.raises(PlanError, match=allowed):
        load_plan(file)


def test_load_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such file"):
        load_plan(tmp_path / "none.toml")
    with pytest.raises(PlanError, match=str(tmp_path)):
        load_plan(tmp_path)


# --- the schema


def test_every_field_is_described() -> None:
    sections = {"": Plan} | SECTIONS
    for name, section in sections.items():
        assert section.__doc__
        for key, field in section.model_fields.items():
            if key not in SECTIONS:
                assert field.description, f"{name}.{key}"


def test_schema_refuses_unknown_keys_everywhere() -> None:
    schema = Plan.model_json_schema()
    assert schema["additionalProperties"] is False
    assert len(schema["$defs"]) == len(SECTIONS) + 2  # a column, and a simulated task
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


# --- numbers derived from a plan


def test_steps_are_rounds_times_local_steps() -> None:
    assert Plan().replace({"rounds.count": 7, "training.local_steps": 3}).steps == 21


def test_step_scale() -> None:
    plan = Plan().replace({"rounds.count": 4})
    assert [plan.step_scale(n) for n in (1, 2, 3, 4)] == pytest.approx(
        [1, 0.8535534, 0.5, 0.1464466]
    )
    constant = plan.replace({"training.schedule": "constant"})
    assert [constant.step_scale(n) for n in (1, 2, 3, 4)] == [1, 1, 1, 1]


def test_noise_shares() -> None:
    lost = {"privacy.tolerated_dropouts": 2, "privacy.tolerated_colluders": 3}
    assert Plan().replace({"aggregation.sites": 16} | lost).noise_shares == 11
    for sites in (None, 5):
        with pytest.raises(PlanError, match=r"aggregation\.sites: found .*more than 5"):
            _ = Plan().replace({"aggregation.sites": sites} | lost).noise_shares


def test_one_colluder_is_tolerated_unless_a_plan_says_otherwise() -> None:
    """Every site knows its own noise share, and the promise is against the other sites, too."""
    shared = {"privacy.mechanism": "distributed", "training.sample_rate": 0.5}
    plan = Plan().replace(shared | {"aggregation.sites": 8})
    assert plan.privacy.tolerated_colluders == 1 and plan.noise_shares == 7
    assert plan.replace({"privacy.tolerated_colluders": 0}).noise_shares == 8


@pytest.mark.parametrize("aggregation", ["real", "summed"])
def test_two_sites_cannot_share_noise(aggregation: str) -> None:
    changes = {
        "privacy.mechanism": "distributed",
        "privacy.secure_aggregation": aggregation,
        "training.sample_rate": 0.5,
        "aggregation.sites": 3,
    }
    plan = Plan().replace(changes)
    with pytest.raises(PlanError, match=r"aggregation\.sites=2 .*at least 3.*'local'"):
        plan.replace({"aggregation.sites": 2})
    assert plan.replace({"aggregation.sites": 2, "privacy.mechanism": "local"})


def test_sums_are_masked_unless_a_distributed_plan_says_otherwise() -> None:
    distributed = Plan().replace(
        {"privacy.mechanism": "distributed", "training.sample_rate": 0.5, "aggregation.sites": 4}
    )
    assert distributed.secure
    assert not distributed.replace({"privacy.secure_aggregation": "summed"}).secure
    assert not distributed.replace({"privacy.mechanism": "local"}).secure
    assert not distributed.replace({"privacy.mechanism": "none"}).secure


def test_plans_older_than_secure_aggregation_keep_their_hash() -> None:
    """Masked is what a plan that says nothing means; only summing in the open is another plan."""
    assert "secure_aggregation" not in Plan().canonical
    summed = Plan().replace({"privacy.secure_aggregation": "summed"})
    assert '"secure_aggregation":"summed"' in summed.canonical
    assert parse_plan(json.loads(summed.canonical), "a").hash == summed.hash


def test_a_run_has_a_largest_number_of_steps() -> None:
    with pytest.raises(PlanError, match="200000 steps"):
        Plan().replace({"rounds.count": 100_000, "training.local_steps": 2})
