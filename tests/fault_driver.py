"""`sr-dpo` in a process of its own, slowed down or made to fail where a test says: fault_driver.py JSON ARGUMENTS.

Only time and single calls are steered; signals, files and processes are real. Keys of the JSON object:

    step_s         every training step takes so much longer
    scoring_s      every step of scoring the reference takes so much longer, and its result is saved at once
    response_s     every response that is generated takes so much longer
    verify_s       so long passes between the commit of a checkpoint and its verification
    compile_s      compiling the train step takes so much longer
    hang_at        training step that never ends, in this process
    raise_at       training step after which this process fails, with the text of `message`
    fsize          limit of the size of any file, in bytes (RLIMIT_FSIZE), from the first training step on
    mark           file whose existence says "this process is in the place that was slowed down"
    pairs          file that gets one JSON line a training step: [step, the pairs in it]
"""

import json
import resource
import sys
import time
from pathlib import Path

from sr_dpo_jax import cli
from sr_dpo_jax.durable import integrity
from sr_dpo_jax.generation import generator
from sr_dpo_jax.train import metrics, program, reference


def main() -> int:
    fault = json.loads(sys.argv[1])

    def mark(place: str) -> None:
        if fault.get("mark"):
            Path(fault["mark"]).write_text(place)

    add, take, check_shards = metrics.StepLog.add, reference.ReferenceScores._take, integrity.check_shards
    respond, compiled = generator.Generator.respond, program.Program.compiled

    def slow_add(self, step, host_step, of_step):
        add(self, step, host_step, of_step)
        if "pairs" in fault:
            with Path(fault["pairs"]).open("a") as file:
                file.write(json.dumps([step, [int(pair) for pair in host_step.pair]]) + "\n")
        if "fsize" in fault:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["fsize"], fault["fsize"]))
        if step == fault.get("hang_at"):
            mark("hanging")
            time.sleep(10_000)
        if step == fault.get("raise_at"):
            raise RuntimeError(fault.get("message", "the fault that was asked for"))
        time.sleep(fault.get("step_s", 0))

    def slow_take(self, pair, result):
        take(self, pair, result)
        if "scoring_s" in fault:
            mark("scoring")
            time.sleep(fault["scoring_s"])

    def slow_check(step_directory, shards):
        if "verify_s" in fault:
            mark("verifying")
            time.sleep(fault["verify_s"])
        check_shards(step_directory, shards)

    def slow_respond(self, params, wanted):
        for found in respond(self, params, wanted):
            mark("responding")
            time.sleep(fault.get("response_s", 0))
            yield found

    def slow_compile(self, *arguments):
        if "compile_s" in fault:
            mark("compiling")
            time.sleep(fault["compile_s"])
        return compiled(self, *arguments)

    program.Program.compiled = slow_compile
    generator.Generator.respond = slow_respond
    metrics.StepLog.add = slow_add
    reference.ReferenceScores._take = slow_take
    integrity.check_shards = slow_check
    if "scoring_s" in fault:
        reference.SAVE_EVERY_S = 0.0
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
