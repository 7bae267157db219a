"""Runs `sr-dpo demo`: the method in a small world where the truth is known, small or in full (`--full`).

Everything goes through the same code as `sr-dpo train`, on files that stay in the output directory: data, YAML files,
runs, responses. The same command again resumes a demo that was stopped, and measures again what is there.

Next: `protocol.py`, which says which runs there are, and `stages.py`, which takes them through the commands.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from sr_dpo_jax.commands import console
from sr_dpo_jax.commands.demo.corpus import Knobs
from sr_dpo_jax.commands.demo.page import write_page
from sr_dpo_jax.commands.demo.protocol import FULL, NOISE, PAIRS_PER_STEP, SMALL, Layout, Setting
from sr_dpo_jax.commands.demo.results import collect, markdown, tables
from sr_dpo_jax.commands.demo.stages import Interrupted, make_base, make_sft, run_arm
from sr_dpo_jax.commands.report.page import report
from sr_dpo_jax.durable.files import write_json, write_text
from sr_dpo_jax.durable.lease import Lease
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.loop import EXIT_DONE

PRINTED = (
    "What the base model knows",
    "True quality of responses",
    "Against the best of each plain objective",
    "Win, tie and lose by true quality (table 2)",
)
"""The tables that are printed at the end, where the setting has them."""


def demo(output_dir: Path, *, full: bool = False, noise: bool = False, seeds: int | None, knobs: Knobs) -> int:
    """Runs `sr-dpo demo` and returns an exit code.

    Raises:
      UsageError: a knob or the number of seeds is out of range, the directory was begun with others, or another demo
        is running there.
    """
    setting = NOISE if noise else FULL if full else SMALL
    if seeds is not None:
        setting = dataclasses.replace(setting, seeds=seeds)
    return run_setting(output_dir, setting, knobs)


def run_setting(output_dir: Path, setting: Setting, knobs: Knobs) -> int:
    """Runs or resumes all that a setting asks for, writes report, results and page, and returns an exit code."""
    if knobs.label_noise is None:
        knobs = dataclasses.replace(knobs, label_noise=setting.label_noise)
    _check(setting, knobs)
    with Lease(output_dir, remedy="name another --output") as lease:
        output_dir.mkdir(parents=True, exist_ok=True)
        lease.take()
        return _run(Layout(output_dir), setting, knobs, lease.check)


def _run(layout: Layout, setting: Setting, knobs: Knobs, check: Callable[[], None]) -> int:
    output_dir = layout.root
    _begin(layout, setting, knobs)
    try:
        console.say("base model", "bold")
        make_base(layout, setting, knobs)
        for seed in range(setting.seeds):
            console.say(f"seed {seed}: sft", "bold")
            make_sft(layout, setting, knobs, seed)
            for arm in setting.arms:
                console.say(f"seed {seed}: {arm.name}", "bold")
                check()
                run_arm(layout, setting, knobs, seed, arm)
            check()
            results = collect(layout, setting, knobs, range(seed + 1))
            write_json(output_dir / "results.json", results)
            write_text(output_dir / "results.md", markdown(results))
            write_page(results, output_dir)
    except Interrupted as interrupted:
        return interrupted.code
    page = output_dir / "report.html"
    report([layout.run(0, name) for name in ("sft", *(arm.name for arm in setting.arms))], page, with_texts=True)
    for title, table in tables(results).items():
        if title not in PRINTED:
            continue
        printed = console.table(table.head[0], *(f">{heading}" for heading in table.head[1:]))
        for cells in table.rows:
            console.row(printed, *cells)
        console.section(title, printed)
    print(
        f"Quality is computed, 0 to 100. Runs, data and YAML files are in {output_dir}, all tables in "
        f"{output_dir / 'results.md'}\n"
        f"Results as a page: {output_dir / 'results.html'}; the runs of seed 0 side by side: {page}"
    )
    return EXIT_DONE


def _check(setting: Setting, knobs: Knobs) -> None:
    knobs.check()
    if setting.seeds < 1:
        raise UsageError(f"--seeds {setting.seeds}: must be 1 or more")
    if knobs.pairs < PAIRS_PER_STEP:
        raise UsageError(f"--pairs {knobs.pairs}: a step holds {PAIRS_PER_STEP}; give at least as many")


def _begin(layout: Layout, setting: Setting, knobs: Knobs) -> None:
    """Writes down what the directory was begun with, and refuses anything else later; only the seeds may grow."""
    file = layout.root / "world.json"
    decisive = dataclasses.asdict(dataclasses.replace(setting, seeds=0)) | {"knobs": dataclasses.asdict(knobs)}
    text = json.dumps(decisive, indent=1) + "\n"
    if not file.exists():
        write_text(file, text)
    elif file.read_text(encoding="utf-8") != text:
        raise UsageError(f"{file}: was begun with another setting or other knobs; name another --output")
