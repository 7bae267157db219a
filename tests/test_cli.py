"""The command line's table: each command names a function that takes its options."""

import importlib
import inspect
from argparse import _SubParsersAction

import pytest

from sr_dpo_jax import cli
from sr_dpo_jax.cli import DONE, FUNCTIONS, main, parser

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


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["generate", "c.yaml", "seed=1", "--output", "o", "--prompts", "p", "seed=3"], ["seed=1", "seed=3"]),
        (["generate", "c.yaml", "--output", "o", "--prompts", "p", "Seed=3"], None),
        (["generate", "c.yaml", "--output", "o", "--prompts", "p", "model.path=x"], ["model.path=x"]),
        (["eval", "c.yaml", "seed.a=1", "--best", "model.path=x y"], ["seed.a=1", "model.path=x y"]),
        (["train", "c.yaml", "--allow-change", "seed", "data.path=[a, b]"], ["data.path=[a, b]"]),
        (["compare", "c.yaml", "dpo", "--seeds", "2", "train.epochs=1"], ["dpo", "train.epochs=1"]),
        (["train", "c.yaml", "--best", "model.path=x"], None),
        (["inspect", "model", "--digest", "model.path=x"], None),
    ],
)
def test_overrides_stand_behind_options_too(words, found):
    """argparse takes what follows an option for no part of the list before it; what is no override is refused."""
    if found is None:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        return
    options = cli._options(words)
    assert getattr(options, "named" if words[0] == "compare" else "overrides") == found
