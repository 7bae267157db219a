"""`sr-dpo demo`: the method in a world where the truth is known, small in minutes or the whole protocol with `--full`.

Everything goes through the same code as `sr-dpo train`, on files that stay in the output directory: data, YAML files,
runs, responses. The same command again resumes what was cut short and measures anew what is there.
"""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import rich.console
import rich.table

from sr_dpo_jax.commands.demo import results as measured
from sr_dpo_jax.commands.demo.corpus import Knobs
from sr_dpo_jax.commands.demo.page import write_page, write_pictures
from sr_dpo_jax.commands.demo.protocol import FULL, SMALL, Layout, Setting
from sr_dpo_jax.commands.demo.stages import Interrupted, make_base, make_sft, run_arm
from sr_dpo_jax.commands.report.page import report
from sr_dpo_jax.commands.report.tables import Table
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.loop import EXIT_DONE

log = logging.getLogger(__name__)


def demo(output_dir: Path, *, full: bool, seeds: int | None, knobs: Knobs) -> int:
    """`sr-dpo demo`; returns an exit code.

    Raises:
      UsageError: a knob or the number of seeds is out of range, or the directory was begun with other ones.
    """
    setting = FULL if full else SMALL
    if seeds is not None:
        setting = dataclasses.replace(setting, seeds=seeds)
    return run_setting(output_dir, setting, knobs)


def run_setting(output_dir: Path, setting: Setting, knobs: Knobs) -> int:
    """Runs or resumes all that a setting asks for, then writes report, results and page; returns an exit code."""
    _check(setting, knobs)
    layout = Layout(output_dir)
    _begin(layout, setting, knobs)
    _keep_compiled(output_dir / "cache" / "compiled")
    console = rich.console.Console(highlight=False, soft_wrap=True)
    try:
        console.rule("base model")
        make_base(layout, setting, knobs)
        for seed in range(setting.seeds):
            console.rule(f"seed {seed}: sft")
            make_sft(layout, setting, knobs, seed)
            for arm in setting.arms:
                console.rule(f"seed {seed}: {arm.name}")
                run_arm(layout, setting, knobs, seed, arm)
            _write_results(layout, setting, knobs, range(seed + 1))
    except Interrupted as interrupted:
        return interrupted.code
    page = output_dir / "report.html"
    report([layout.run(0, name) for name in ("sft", *(arm.name for arm in setting.arms))], page, with_texts=True)
    found = json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
    for title, table in _shown(found).items():
        console.print(_printed(title, table))
    console.print(
        f"Quality is computed, 0 to 100. Runs, data and YAML files are in {output_dir}, all tables in "
        f"{output_dir / 'results.md'}"
    )
    console.print(f"Results as a page: {output_dir / 'results.html'}; the runs of seed 0 side by side: {page}")
    return EXIT_DONE


def _check(setting: Setting, knobs: Knobs) -> None:
    knobs.check()
    if setting.seeds < 1:
        raise UsageError(f"--seeds {setting.seeds}: must be 1 or more")
    if knobs.pairs < setting.pairs_per_step:
        raise UsageError(f"--pairs {knobs.pairs}: a step holds {setting.pairs_per_step}; give at least as many")


def _begin(layout: Layout, setting: Setting, knobs: Knobs) -> None:
    """Remembers what the directory was begun with; the number of seeds may grow."""
    layout.root.mkdir(parents=True, exist_ok=True)
    file = layout.root / "world.json"
    decisive = dataclasses.asdict(dataclasses.replace(setting, seeds=0)) | {"knobs": dataclasses.asdict(knobs)}
    text = json.dumps(decisive, indent=1) + "\n"
    if not file.exists():
        file.write_text(text, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != text:
        raise UsageError(f"{file}: was begun with another setting or other knobs; name another --output")


def _keep_compiled(directory: Path) -> None:
    """Runs of one form differ in data alone, so each program is compiled once; a user's own cache stays in use."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _write_results(layout: Layout, setting: Setting, knobs: Knobs, seeds: range) -> None:
    found = measured.collect(layout, setting, knobs, seeds)
    measured.write(found, layout.root / "results.json")
    (layout.root / "results.md").write_text(measured.markdown(found), encoding="utf-8")
    write_page(found, layout.root / "results.html")
    write_pictures(found, layout.root)


def _shown(found: measured.Results) -> dict[str, Table]:
    """What is printed at the end: the first three tables of the page."""
    return dict(list(measured.tables(found).items())[:3])


def _printed(title: str, table: Table) -> rich.table.Table:
    printed = rich.table.Table(title=title)
    for index, heading in enumerate(table.head):
        printed.add_column(heading, justify="right" if index else "left")
    for row in table.rows:
        printed.add_row(*row)
    return printed
