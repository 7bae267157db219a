"""Runs `sr-dpo demo` in a setting too small for the command line; takes FIELDS.json PAIRS OUTPUT_DIR."""

import dataclasses
import json
import logging
import sys
from pathlib import Path

import same_programs

from sr_dpo_jax.commands.demo.corpus import Knobs
from sr_dpo_jax.commands.demo.demo import run_setting
from sr_dpo_jax.commands.demo.protocol import FULL

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    fields, pairs, output = json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    named = fields.pop("arms")
    arms = tuple(arm for arm in FULL.arms if arm.name in named)
    with same_programs.shared():  # the arms of all seeds have few programs between them
        code = run_setting(output, dataclasses.replace(FULL, arms=arms, **fields), Knobs(pairs=pairs))
    sys.exit(code)
