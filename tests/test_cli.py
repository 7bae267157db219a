"""The command line's table: each command names a function that takes its options."""

import importlib
import inspect
from argparse import _SubParsersAction

import pytest

from sr_dpo_jax.cli import DONE, FUNCTIONS, parser

(ACTION,) = (action for action in parser()._actions if isinstance(action, _SubParsersAction))
LATE = [name for name, function in FUNCTIONS.items() if isinstance(function, str)]


def test_every_command_has_a_function():
    assert list(FUNCTIONS) == list(ACTION.choices) and DONE.keys() < set(LATE)


@pytest.mark.parametrize("name", LATE)
def test_a_command_names_a_function_that_takes_its_options(name):
    """The names stand in text, because the functions are imported only when the command runs."""
    if name == "lm-eval":
        pytest.importorskip("lm_eval")
    if name == "judge":
        pytest.importorskip("openai")
    module, _, function = FUNCTIONS[name].partition(":")
    options = {action.dest for action in ACTION.choices[name]._actions} - {"help"}
    if "config" in options:
        options -= {"overrides"}  # they are in the configuration
    signature = inspect.signature(getattr(importlib.import_module(f"sr_dpo_jax.{module}"), function))
    signature.bind(**dict.fromkeys(options))
