"""Programs that runs of one test file have in common are traced and lowered once.

Most of the time of a tiny run in this process goes to that, and every run makes its programs anew. Here the makers give
the jitted function that they gave before for equal arguments. A trap: a test that changes what is traced, or that
watches what is compiled, must not share; and where a file says that a start anew gives the same numbers, at least one
of its tests must trace anew (`anew`).
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from sr_dpo_jax.generation import generator
from sr_dpo_jax.train import scored_set, setup

_kept: list[dict[Any, Any]] = []
"""One dictionary while programs are shared, none otherwise."""


def _layout(tree: Any) -> Any:
    """What jax compiles for: the structure, shapes, types and shardings of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)


def _key(given: Any) -> Any:
    """A hashable value, equal for arguments of equal content."""
    if isinstance(given, setup.PlacedModel):
        return given.graph, given.mesh, _layout(given.shapes)
    if isinstance(given, setup.Objective):
        return dataclasses.replace(given, numbers=()), tuple(sorted(given.numbers.items()))
    if isinstance(given, dict):
        return json.dumps(given, sort_keys=True)
    return _layout(given) if isinstance(given, generator.State) else given


def _once(make: Any) -> Any:
    def made(*arguments: Any, **named: Any) -> Any:
        if not _kept:
            return make(*arguments, **named)
        key = (make, *map(_key, arguments), *((name, _key(value)) for name, value in sorted(named.items())))
        if key not in _kept[-1]:
            _kept[-1][key] = make(*arguments, **named)
        return _kept[-1][key]

    return made


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Shares programs from here on."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((setup, "make_program"), (scored_set, "make_score_step"), (generator, "make_programs")):
            patch.setattr(module, name, _once(getattr(module, name)))
        _kept.append({})
        try:
            yield
        finally:
            _kept.clear()


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """Makes every program anew, for as long as this lasts."""
    kept = _kept.copy()
    _kept.clear()
    try:
        yield
    finally:
        _kept.extend(kept)
