"""A YAML file with overrides -> a checked `Config`, or one error that names every problem. Imports no jax."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from sr_dpo_jax.config.checks import cross_checks
from sr_dpo_jax.config.explain import explain, secrets_in
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.config.yaml_text import apply_override, parse
from sr_dpo_jax.errors import UsageError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides, each value written as YAML.

    Raises UsageError with every problem in it, each as key path, value and remedy.
    """
    try:
        raw = parse(Path(path).read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the configuration ({error}); name an existing YAML file") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: holds {type(raw).__name__}, not a mapping of sections; the README shows one")
    return config_from_dict(raw, overrides, where=str(path), of_a_run=(Path(path).parent / "manifest.json").is_file())


def config_for_model(path: str, overrides: Sequence[str] = ()) -> Config:
    """Makes the configuration of a command that takes a model and no data; errors as those of `load_config`."""
    raw = {"output_dir": path, "model": {"path": path}, "data": {"path": "none"}, "objective": {"name": "sft"}}
    return config_from_dict(raw, overrides, where=path)


def config_from_dict(
    raw: dict[str, Any], overrides: Sequence[str] = (), *, where: str, of_a_run: bool = False
) -> Config:
    """Checks a nested mapping, which takes the overrides.

    Args:
      raw: the mapping.
      overrides: `section.key=value` each.
      where: the mapping's origin, for messages.
      of_a_run: it is what a run wrote of itself: keys of another objective or optimizer in it are passed over.
    """
    for override in overrides:
        apply_override(raw, override)
    secrets = list(secrets_in(raw))
    if secrets:
        raise _refusal(where, secrets)
    try:
        # Strict JSON mode takes a list for a tuple and an integer for a float, and nothing else across types.
        config = Config.model_validate_json(json.dumps(raw), context=of_a_run)
    except pydantic.ValidationError as error:
        raise _refusal(where, [explain(item, Config) for item in error.errors()]) from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: a value is neither text, number, list nor mapping ({error})") from None
    problems = cross_checks(config)
    if problems:
        raise _refusal(where, problems)
    return config


def _refusal(where: str, problems: Sequence[str]) -> UsageError:
    return UsageError("\n".join([f"{where}: {len(problems)} problem(s)", *problems]))
