"""`loopwright plan`, `loopwright bench-machine`: what trainings will take, and what this machine reaches."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from components.config.params import InputError, load_params
from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json, print_table, say
from loopwright.run import read_overrides

_MACHINE = "machine.json"


def plan(
    scale: Annotated[str | None, typer.Option(help="smoke, laptop, gpu or cluster; instead of params.yaml's.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE; params.yaml stays.")] = None,
    device: Annotated[str, typer.Option(help="h200, h100, a100, l40s or l4; else the machine of bench-machine.")] = "",
    devices: Annotated[int | None, typer.Option(min=1, help="How many; else run.processes.")] = None,
    price: Annotated[float, typer.Option(min=0, help="Of an hour of one device.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Print what each training of params.yaml takes on each of its devices, and run nothing."""
    from components.training import plan as planning

    paths = Paths(find_root())
    params = load_params(paths.params, read_overrides(scale, set_ or []))
    if device and device not in planning.PUBLISHED:
        raise InputError(f"--device: {device!r} is not one of {', '.join(planning.PUBLISHED)}")
    measured = paths.home / _MACHINE
    machine = planning.PUBLISHED.get(device) or (planning.Machine.read(measured) if measured.is_file() else None)
    count = devices or (params.run.processes if params.run.launcher != "local" else 1)
    stages = planning.plan(params, machine, count)
    seconds = sum(stage.seconds or 0.0 for stage in stages)
    cost = seconds / 3600 * price * count
    on_base = {name: config.base for name, config in params.fine_tuned.items() if config.base}
    if as_json:
        stage_rows = [asdict(stage) for stage in stages]
        about = {"device": machine and machine.name, "devices": count}
        print_json({**about, "stages": stage_rows, "on_base": on_base, "seconds": seconds, "cost": cost})
        return
    memory = "memory" if count == 1 else "memory each"
    print_table(
        ("stage", "parameters", "tokens", "FLOPs", memory, "checkpoints", "rows", "time"),
        [
            (
                stage.stage,
                _short(stage.parameters),
                _short(stage.tokens),
                f"{stage.flops:.2e}",
                f"{stage.memory / 2**30:.1f} GiB"
                + (" (too much)" if machine and stage.memory > machine.memory else ""),
                f"{stage.disk / 2**30:.1f} GiB",
                f"{stage.rows / 2**30:.1f} GiB",
                _duration(stage.seconds) if stage.seconds is not None else None,
            )
            for stage in stages
        ],
    )
    for section, base in on_base.items():
        print(f"{section}: not above: on the base {base}; its stage says what it takes before its first step")
    if machine is None:
        say('No time without a machine: "loopwright bench-machine" measures this one, or name one with --device')
        return
    source = "as measured here" if machine.measured else f"at {planning.ASSUMED_SHARE:.0%} of the published peak"
    bill = f", {cost:,.2f} at {price:g} an hour" if price else ""
    print(f"{_duration(seconds)} of training on {'one' if count == 1 else count} {machine.name}, {source}{bill}")


def bench_machine(as_json: Json = False) -> None:
    """Measure training steps of three sizes on this machine, half a minute, for `loopwright plan`."""
    from components.training.plan import measure_machine

    paths = Paths(find_root())
    machine = measure_machine(load_params(paths.params).pretrain.decoder, say)
    machine.write(paths.home / _MACHINE)
    if as_json:
        print_json(asdict(machine))
    else:
        print(f'{paths.home / _MACHINE}: written; see "loopwright plan"')


def _short(count: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _duration(seconds: float) -> str:
    if seconds >= 2 * 86_400:
        return f"{seconds / 86_400:.1f} days"
    return f"{seconds / 3600:.1f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.1f} min"
