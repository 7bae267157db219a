"""The command line's table: each command names a function that takes its options."""

import importlib
import inspect
from argparse import _SubParsersAction

import pytest

from sr_dpo_jax.cli import parser

(ACTION,) = (action for action in parser()._actions if isinstance(action, _SubParsersAction))
LATE = {name: command for name, command in ACTION.choices.items() if isinstance(command.get_default("function"), str)}


@pytest.mark.parametrize("name", LATE)
def test_a_command_names_a_function_that_takes_its_options(name):
    """The names stand in text, because the functions are imported only when the command runs."""
    if name == "lm-eval":
        pytest.importorskip("lm_eval")
    if name == "judge":
        pytest.importorskip("openai")
    module, _, function = LATE[name].get_default("function").partition(":")
    options = {action.dest for action in LATE[name]._actions} - {"help"}
    if "config" in options:
        options -= {"overrides"}  # they are in the configuration
    signature = inspect.signature(getattr(importlib.import_module(f"sr_dpo_jax.{module}"), function))
    signature.bind(**dict.fromkeys(options))
