"""Programs that runs of tests have in common are traced, lowered and compiled once a session.

Most of the time of a tiny run in this process goes to that, and every run makes its programs anew. Here the makers give
the jitted function that they gave before for equal arguments, and a function gives what it compiled before for equal
shapes. A trap: a test that changes what is traced, or that watches what is compiled, must not share; and where a file
says that a start anew gives the same numbers, at least one of its tests must trace anew (`anew`).
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from sr_dpo_jax.generation import generator
from sr_dpo_jax.parallel.mesh import jit_on
from sr_dpo_jax.train import scored_set, setup
from sr_dpo_jax.train.program import Program
from sr_dpo_jax.weights import placement

_all: dict[Any, Any] = {}
"""Everything that this session has made while programs were shared."""
_kept: list[dict[Any, Any]] = []
"""One dictionary while programs are shared, none otherwise."""


def _layout(tree: Any) -> Any:
    """What jax compiles for: the structure, shapes, types and shardings of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)


def _key(given: Any) -> Any:
    """A hashable value, equal for arguments of equal content."""
    if isinstance(given, setup.PlacedModel):
        return given.graph, given.mesh, _layout(given.shapes)
    if isinstance(given, setup.Objective):
        terms = tuple((weight, _key(term)) for weight, term in given.terms)
        return dataclasses.replace(given, numbers=(), terms=()), tuple(sorted(given.numbers.items())), terms
    if isinstance(given, dict):
        return json.dumps(given, sort_keys=True)
    return _layout(given) if isinstance(given, generator.State) else given


class _Jitted:
    """A jitted function that remembers what it has traced, lowered and compiled ahead of time."""

    def __init__(self, function: Any):
        self._function, self._traced = function, {}

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def lower(self, *arguments: Any) -> "_Lowered":
        return self.trace(*arguments).lower()

    def trace(self, *arguments: Any) -> "_Traced":
        key = _layout(arguments)
        if key not in self._traced:
            self._traced[key] = _Traced(self._function.trace(*arguments))
        return self._traced[key]


class _Traced:
    """A traced program that is lowered once."""

    def __init__(self, traced: Any):
        self._traced, self.jaxpr, self._lowered = traced, traced.jaxpr, None

    def lower(self) -> "_Lowered":
        if self._lowered is None:
            self._lowered = _Lowered(self._traced.lower())
        return self._lowered


class _Lowered:
    """A lowered program that is compiled once."""

    def __init__(self, lowered: Any):
        self._lowered, self._compiled = lowered, None

    def compile(self) -> Any:
        if self._compiled is None:
            self._compiled = self._lowered.compile()
        return self._compiled


def _remembering(made: Any) -> Any:
    """The maker's result, with `_Jitted` in the place of its functions."""
    if isinstance(made, Program):
        return dataclasses.replace(made, step=_Jitted(made.step))
    return tuple(map(_Jitted, made)) if isinstance(made, tuple) else _Jitted(made)


def _once(make: Any) -> Any:
    def made(*arguments: Any, **named: Any) -> Any:
        if not _kept:
            return make(*arguments, **named)
        key = (make, *map(_key, arguments), *((name, _key(value)) for name, value in sorted(named.items())))
        if key not in _kept[-1]:
            _kept[-1][key] = _remembering(make(*arguments, **named))
        return _kept[-1][key]

    return made


def _drawn_once(base_params: Any) -> Any:
    """Draws the weights of one model and seed, or its adapters, by one program, anew each time."""

    def drawn(model: placement.PlacedModel) -> Any:
        if not _kept:
            return base_params(model)
        key = ("base_params", *_key(model), model.architecture, model.lora, model.drawn, model.seed)

        def initialise(mesh: Any, make: Any, shardings: Any) -> Any:
            part = (*key, jax.tree.structure(shardings))  # all of it, the base or the adapters
            if part not in _kept[-1]:
                _kept[-1][part] = jit_on(mesh, make, out_shardings=shardings)
            return _kept[-1][part]()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(placement, "initialise", initialise)
            return base_params(model)

    return drawn


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Shares programs from here on, also with those who shared before."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((setup, "make_program"), (scored_set, "make_score_step"), (generator, "make_programs")):
            patch.setattr(module, name, _once(getattr(module, name)))
        base_params = placement.PlacedModel.base_params
        patch.setattr(placement.PlacedModel, "base_params", _drawn_once(base_params))
        _kept.append(_all)
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
