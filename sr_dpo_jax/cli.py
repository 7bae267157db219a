"""The command line. Exit codes: 0 done, 2 bad usage, config or data, 75 preempted (run it again), 1 anything else."""

import argparse
import dataclasses
import gc
import importlib
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sr_dpo_jax.commands import console
from sr_dpo_jax.commands.tune import METRIC
from sr_dpo_jax.config.load import load_config
from sr_dpo_jax.config.schema import PAPER_INSTRUCTION, Config
from sr_dpo_jax.durable.files import require_output
from sr_dpo_jax.errors import RunError, UsageError
from sr_dpo_jax.redaction import Formatter, redact

EXIT_FAILED, EXIT_USAGE = 1, 2
OVERRIDE = re.compile(r"[a-z_]+(\.\w+)*=.*", re.DOTALL)
OTHERS_END_S = 2.0
"""Time that a process of several which fails leaves to the others, see `_end`."""
BEST = "the best checkpoint, by checkpoint.best_metric, in place of the latest"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _options(arguments)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("sr_dpo_jax").setLevel(logging.INFO)
    sys.excepthook = _fail
    threading.excepthook = lambda thread: print(_traceback(thread.exc_value), file=sys.stderr)
    sys.unraisablehook = lambda unraisable: print(_traceback(unraisable.exc_value), file=sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # it warns of the forks that grain and orbax never make
    try:
        return _run(options)
    except (UsageError, RunError) as error:
        last = redact(f"sr-dpo {options.command}: {error}")
        code = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    # Tasks of a failed save log their exceptions, a hundred lines, when they are collected: the readable word is last.
    gc.collect()
    print(last, file=sys.stderr)
    return _end(code)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; overrides `section.key=value` may stand behind options too, where argparse sees none."""
    made = parser()
    options, rest = made.parse_known_args(arguments)
    if rest:
        key = next((name for name in ("overrides", "named") if hasattr(options, name)), None)
        if key is None or not all(OVERRIDE.fullmatch(word) for word in rest):
            made.error(f"unrecognized arguments: {' '.join(rest)}")
        setattr(options, key, [*getattr(options, key), *rest])
    return options


def _fail(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    print(_traceback(error), file=sys.stderr)
    _end(EXIT_FAILED)


def _traceback(error: BaseException | None) -> str:
    return redact("".join(traceback.format_exception(error))).rstrip()


def _end(code: int) -> int:
    """Ends one process of several that fails without jax's exit, which would wait for the others, and they for it.

    Process 0 holds jax's coordination service, and when that ends, jax ends the others in the middle of what they say.
    What stops all stops them at nearly one time, so each gives the others a moment to say it and to end by themselves.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(OTHERS_END_S)
        os._exit(code)
    return code


def _run(options: argparse.Namespace) -> int:
    """Calls the command's function with its options under their names; gives the exit code.

    The function is imported only here, and the configuration is read before: `--help` and errors in it need no jax.
    """
    function = FUNCTIONS[options.command]
    given = {name: value for name, value in vars(options).items() if name != "command"}
    if "config" in given:
        given["config"] = load_config(given["config"], given.pop("overrides"))
    if given.get("json") is not None:
        require_output(given["json"], option="--json")
    if isinstance(function, str):
        module, _, name = function.partition(":")
        function = getattr(importlib.import_module(f"sr_dpo_jax.{module}"), name)
    result = function(**given)
    if options.command in DONE:
        print(DONE[options.command].format(result=result, **given))
        return 0
    return result or 0


def _eval(config: Config, *, best: bool) -> None:
    from sr_dpo_jax.commands.evaluate import evaluate_command

    for name, value in evaluate_command(config, best=best).items():
        print(f"{name:28} {value:.6g}")


def _score(config: Config, *, output: Path | None, knowledge: bool) -> None:
    from sr_dpo_jax.commands.evaluate import score_command

    count = score_command(config, output, knowledge=knowledge)
    if output is not None:
        print(f"{count} pairs scored in {output}")


def _inspect(model: str, *, mesh: str, json: Path | None, **options: Any) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # the accelerator belongs to whoever trains on it
    from sr_dpo_jax.commands.inspect.inspect import inspect_model, parse_mesh
    from sr_dpo_jax.commands.inspect.show import print_inspection

    inspection = inspect_model(model, mesh=parse_mesh(mesh), **options)
    print_inspection(inspection)
    if json is not None:
        console.write_json(json, dataclasses.asdict(inspection))
    return EXIT_USAGE if inspection.problems else 0


def _compile(config: Config, *, slices: int, json: Path | None, **options: Any) -> int:
    if slices < 1:
        raise UsageError(f"--slices {slices}: give the number of slices, 1 or more")
    # Before jax is imported: libtpu is to look for no TPU, and jax is not to start one.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    # Or libtpu complains that this machine is no TPU worker; the values play no part in what it compiles.
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-16"}
    from sr_dpo_jax.commands.compile.search import compile_command
    from sr_dpo_jax.commands.compile.show import print_report, write_json

    report = compile_command(config, slices=slices, **options)
    print_report(report)
    if json is not None:
        write_json(json, report)
    return 0 if report.compiled.fits else EXIT_USAGE


def _compare(
    path: str, *, named: Sequence[str], seeds: int, betas: Sequence[float], prompts: Path | None, scorer: str | None
) -> int:
    from sr_dpo_jax.commands.compare import compare
    from sr_dpo_jax.commands.scorer import Generation

    if scorer is not None and prompts is None:
        raise UsageError(f"--scorer {scorer}: there is nothing to score; give --prompts FILE.jsonl too")
    generation = None if prompts is None else Generation(prompts, scorer)
    return compare(path, named, seeds=seeds, factors=betas, generation=generation)


def _factors(text: str) -> tuple[float, ...]:
    return tuple(float(item) for item in text.split(","))


def _demo(output: Path, *, full: bool, noise: bool, seeds: int | None, **knobs: Any) -> int:
    from sr_dpo_jax.commands.demo.corpus import Knobs, parse_gaps
    from sr_dpo_jax.commands.demo.demo import demo

    turned = {name: value for name, value in knobs.items() if value is not None}
    if "gaps" in turned:
        turned["gaps"] = parse_gaps(turned["gaps"])
    return demo(output, full=full, noise=noise, seeds=seeds, knobs=Knobs(**turned))


FUNCTIONS: dict[str, str | Callable[..., Any]] = {
    "train": "train.loop:train",
    "score": _score,
    "eval": _eval,
    "generate": "commands.generate:generate_command",
    "judge": "commands.judge.command:judge_command",
    "lm-eval": "commands.lm_eval.command:lm_eval_command",
    "export": "commands.export:export",
    "inspect": _inspect,
    "compile": _compile,
    "tune": "commands.tune:tune",
    "compare": _compare,
    "report": "commands.report.page:report",
    "demo": _demo,
}
"""The function of each command, which takes its options under their names and gives the exit code, None for 0."""
DONE = {
    "generate": "{result} responses in {output}",
    "export": "written to {out_dir}",
    "report": "{result} run(s) compared in {output}",
}
"""The text to print after the commands whose function gives a result in place of an exit code."""
Command = Callable[[str, str], argparse.ArgumentParser]
WithConfig = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """Makes the parser of every command with its options."""
    made = argparse.ArgumentParser(prog="sr-dpo", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=summary)

    def with_config(added: argparse.ArgumentParser, dest: str = "config") -> argparse.ArgumentParser:
        added.add_argument(dest, metavar="config", help="YAML file; the README shows one")
        added.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
        return added

    _add_runs(command, with_config)
    _add_benchmarks(command)
    _add_models(command, with_config)
    choice = "a run for each of several values, as in objective.lam=0.1,0.3,0.5,1, and the choice"
    tune = with_config(command("tune", choice), dest="path")
    tune.add_argument("--metric", default=METRIC, help=f"of a held-out set, as in metrics.jsonl; default: {METRIC}")
    tune.add_argument("--eval-pairs", type=int, metavar="N", help="decides on the first N pairs of that set")
    compared = "objectives on the same pairs, β swept for each, with paired tests"
    compare = command("compare", compared)
    compare.add_argument("path", metavar="config", help="YAML file that all runs share")
    named = "an objective, as in sr_dpo,lam=0.5,refinement.form=contrast, or an override section.key=value for all runs"
    compare.add_argument("named", nargs="+", metavar="OBJECTIVE[,key=value...]", help=named)
    compare.add_argument("--seeds", type=int, default=1, metavar="N", help="default: 1")
    factors = "of each objective's β that the first seed tries; default: 0.1,0.3,1,3"
    compare.add_argument("--betas", type=_factors, default=(0.1, 0.3, 1.0, 3.0), metavar="F1,F2", help=factors)
    responding = "the runs with the best β respond to these prompts, as in sr-dpo generate"
    compare.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help=responding)
    scoring = "reads these responses as JSON lines and writes a number for each"
    compare.add_argument("--scorer", metavar="COMMAND", help=scoring)
    report = command("report", "one HTML page that compares runs: curves, held-out pairs, tables to copy")
    report.add_argument("directories", nargs="+", type=Path, metavar="RUN_DIR")
    report.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE.html")
    report.add_argument("--with-texts", action="store_true", help="shows the texts of sample pairs too")
    _add_demo(command)
    return made


def _add_runs(command: Command, with_config: WithConfig) -> None:
    train = with_config(command("train", "SFT or preference training; the same command again resumes"))
    train.add_argument(
        "--allow-change",
        dest="allowed_changes",
        action="append",
        default=[],
        metavar="KEY",
        help="resumes although this key, named in the refusal, has another value than before; may be repeated",
    )
    score = with_config(command("score", "log-probs of every pair of data.path under model.path"))
    score.add_argument("--output", type=Path, metavar="FILE.jsonl")
    table = "prints whether the model knows which responses are better: what objective.lam=auto is settled by"
    score.add_argument("--knowledge", action="store_true", help=table)
    evaluate = with_config(
        command("eval", "metrics on held-out pairs, of the latest checkpoint of output_dir or of model.path")
    )
    evaluate.add_argument("--best", action="store_true", help=BEST)
    generate = with_config(command("generate", "responses to a file of prompts"))
    generate.add_argument("--prompts", dest="prompts_file", required=True, type=Path, metavar="FILE.jsonl")
    generate.add_argument("--output", required=True, type=Path, metavar="FILE.jsonl")
    generate.add_argument("--best", action="store_true", help=BEST)


def _add_demo(command: Command) -> None:
    demo = command("demo", "the method in a world where the quality of responses is computed, in minutes")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR")
    which = demo.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="the paper's protocol: every objective, every λ, seeds")
    which.add_argument(
        "--noise", action="store_true", help="labels of which some are wrong: the contrast and its rivals"
    )
    demo.add_argument("--seeds", type=int, metavar="N", help="default: 1, with --full or --noise 5")
    demo.add_argument("--pairs", type=int, metavar="N", help="size of the preference set")
    demo.add_argument("--beta", type=float, metavar="B", help="β of every objective")
    demo.add_argument("--rated-share", type=float, metavar="S", help="of the base text, with instruction and rating")
    demo.add_argument("--rating-noise", type=float, metavar="S", help="share of ratings there that are drawn by chance")
    demo.add_argument("--label-noise", type=float, metavar="S", help="share of pairs labelled the wrong way round")
    demo.add_argument("--gaps", metavar="1,1,1", help="weights of pairs of close, clear and far quality")


def _add_models(command: Command, with_config: WithConfig) -> None:
    export = command("export", "writes a checkpoint as a Hugging Face directory")
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    export.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="default: the latest")
    which.add_argument("--best", action="store_true", help=BEST)
    export.add_argument("--merge", action="store_true", help="adds LoRA adapters to the weights; else a PEFT directory")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the run's param_dtype, merged its dtype"
    )
    most = "most bytes of a file of weights; default: 5 GB"
    export.add_argument("--shard-bytes", type=int, default=argparse.SUPPRESS, metavar="N", help=most)
    inspect = command("inspect", "what a person wants to know of a model before a run; touches no device")
    inspect.add_argument("model", metavar="MODEL", help="a Hugging Face directory or hub name")
    inspect.add_argument("--revision", help="pin of a hub name")
    inspect.add_argument("--mesh", default="fsdp=8", metavar="replica=1,fsdp=8,tensor=1", help="default: fsdp=8")
    inspect.add_argument("--prompt", default=PAPER_INSTRUCTION, help="the instruction p; default: the paper's")
    inspect.add_argument("--digest", action="store_true", help="fetches and reads all weights, for their sha256")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="writes the same there")
    compiler = with_config(command("compile", "whether the steps fit TPUs that are not there, and how fast"))
    compiler.add_argument("--topology", required=True, metavar="v5p:4x4x4", help="of one slice, as jax names it")
    compiler.add_argument("--slices", type=int, default=1, metavar="N", help="default: 1")
    compiler.add_argument("--read-data", action="store_true", help="plans from the data instead of typical lengths")
    compiler.add_argument("--quick", action="store_true", help="least effort: memory alone, in a fifth of the time")
    compiler.add_argument("--json", type=Path, metavar="FILE", help="writes the same there")


def _add_benchmarks(command: Command) -> None:
    judge = command("judge", "compares two files of answers with a judge behind an OpenAI-compatible endpoint")
    judge.add_argument("first", type=Path, metavar="A.jsonl", help="answers, as sr-dpo generate or MT-Bench has them")
    judge.add_argument("second", type=Path, metavar="B.jsonl", help="those to compare with")
    judge.add_argument("--questions", required=True, type=Path, metavar="FILE.jsonl", help="as MT- or Vicuna-Bench")
    judge.add_argument("--output", required=True, type=Path, metavar="FILE.json")
    judge.add_argument("--judge-config", type=Path, metavar="FILE.yaml", help="prompts and more, in place of our own")
    judge.add_argument("--model", metavar="NAME", help="the judge's name at the endpoint")
    judge.add_argument("--base-url", metavar="URL", help="of the endpoint; the key comes from the environment")
    lm_eval = command("lm-eval", "tasks of lm-evaluation-harness, the model on the mesh")
    lm_eval.add_argument(
        "model", metavar="RUN_OR_MODEL", help="output_dir of a run, or a Hugging Face directory or name"
    )
    lm_eval.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as model.dtype=float32")
    which = lm_eval.add_mutually_exclusive_group(required=True)
    which.add_argument("--tasks", type=lambda names: names.split(","), metavar="T1,T2", help="names of tasks or groups")
    paper = "the paper's six, with its few-shot counts and metrics"
    which.add_argument("--paper", dest="tasks", action="store_const", const=None, help=paper)
    lm_eval.add_argument("--include-path", type=Path, metavar="DIR", help="task files of your own; may hold code")
    lm_eval.add_argument("--num-fewshot", type=int, metavar="N", help="default: what each task says")
    lm_eval.add_argument("--limit", type=int, metavar="N", help="first N examples of each task, for a trial")
    lm_eval.add_argument("--apply-chat-template", action="store_true", help="asks questions through the chat template")
    lm_eval.add_argument("--output", type=Path, metavar="FILE.json")
    lm_eval.add_argument("--best", action="store_true", help=f"of a run, {BEST}")


if __name__ == "__main__":
    sys.exit(main())
