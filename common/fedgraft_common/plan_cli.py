"""`fedgraft plan`: check a plan file, or print the schema of plans."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from fedgraft_common.plan import Plan, load_plan

app = typer.Typer(no_args_is_help=True, help="Check a plan, or print its schema.")
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. privacy.epsilon=2."),
]


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A plan file (TOML).")],
    changes: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
) -> None:
    """Validate a plan and print its hash and what it costs a site."""
    plan = load_plan(file, changes or ())
    if plan.aggregation.sites is None:
        plan = plan.replace({"aggregation.sites": plan.sites.count})
    if as_json:
        document = {"hash": plan.hash, "plan": plan.model_dump(mode="json")}
        typer.echo(json.dumps(document, indent=2))
        return
    from fedgraft_common.adapted import adapted_backbone
    from fedgraft_common.mechanism import step_noise

    model = adapted_backbone(plan)
    values = sum(parameter.numel() for parameter in model.adapter.values())
    typer.echo(f"plan        {plan.name}")
    typer.echo(f"hash        {plan.hash}")
    typer.echo(f"backbone    {plan.backbone.source}, sha256 {model.backbone.sha256[:12]}")
    typer.echo(
        f"adapter     {plan.adapter.method}: {values} values in {len(model.adapter)} tensors, "
        f"{4 * values} bytes a round"
    )
    typer.echo(f"steps       {plan.steps} in {plan.rounds.count} rounds")
    if plan.privacy.mechanism == "none":
        typer.echo("privacy     none")
    elif plan.training.sample_rate is None:
        typer.echo("privacy     depends on the nominal size each site declares")
    else:
        nominal = round(plan.training.expected_batch / plan.training.sample_rate)
        step = step_noise(plan, max(nominal, 1), "of the plan")
        assert step.event is not None  # noqa: S101 - a mechanism other than none has one
        typer.echo(
            f"privacy     {plan.privacy.mechanism}: epsilon "
            f"{step.epsilon(plan.privacy.delta):.4f} at delta {plan.privacy.delta:g} with q "
            f"{step.sample_rate:g}, sigma {step.event.noise_multiplier:.4f}"
        )
    if plan.privacy.mechanism == "distributed":
        _print_promise(plan)
    if plan.secure:
        _print_integers(plan, values)


def _print_promise(plan: Plan) -> None:
    """Whom it holds against; and what another site could say, where it does not."""
    from fedgraft_common.accounting import SamplingEvent, epsilon
    from fedgraft_common.mechanism import against, noise_multiplier

    if not plan.secure:
        typer.echo(
            "promise     none against the server, which sees each update: sums are added in the "
            "open, in a simulation only"
        )
        return
    typer.echo(f"promise     against {against(plan)}")
    if plan.privacy.tolerated_colluders == 0:
        rate, unknown = plan.training.sample_rate, plan.noise_shares - 1
        assert rate is not None  # noqa: S101 - such a plan has one
        weaker = noise_multiplier(plan, rate) * math.sqrt(unknown / plan.noise_shares)
        steps = [SamplingEvent(rate, weaker, plan.steps)] if unknown else []
        found = epsilon(steps, plan.privacy.delta) if steps else math.inf
        typer.echo(
            f"            WEAKER than usual: epsilon {found:.4f} against a site that sees the sums"
        )


def _print_integers(plan: Plan, length: int) -> None:
    """How sums travel, and epsilon once more, of the discrete noise itself."""
    from fedgraft_common.discrete_accounting import discrete_epsilon
    from fedgraft_common.fixed_point import fixed_point

    field = fixed_point(plan, length)
    rate, delta = plan.training.sample_rate, plan.privacy.delta
    assert rate is not None  # noqa: S101 - such a plan has one
    second = discrete_epsilon(field, plan.noise_shares, rate, plan.steps, delta)
    typer.echo(
        f"integers    {field.bits} bits, {field.scale:.0f} to one; noise of {field.shares} of "
        f"{field.sites} sites counts"
    )
    typer.echo(f"            epsilon {second:.4f} of the discrete noise itself, training alone")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a plan."""
    typer.echo(json.dumps(Plan.model_json_schema(), indent=2))
