"""A kernel is compared with the dense path before a run trusts it: a right one passes, broken ones are found."""

import dataclasses
import logging
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import tiny
from runs import model_directory, preference_file, tiny_setup

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.attention import DENSE, AttentionPath
from sr_dpo_jax.model.kernels import check, splash
from sr_dpo_jax.model.kernels.check import kernel_errors
from sr_dpo_jax.train import setup as setups
from sr_dpo_jax.weights import placement


def errors_of(path, dtype, family="gemma", shape=(1, 1, 1)):
    return kernel_errors(path, tiny.make_mesh(*shape), tiny.ARCHITECTURES[family], jnp.dtype(dtype))


def passes(errors):
    return all(error <= allowed for error, allowed in errors.values())


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", (1, 2, 2)),
        pytest.param("float32", (1, 1, 1), marks=pytest.mark.slow),
        ("bfloat16", (1, 1, 1)),
        pytest.param("bfloat16", (1, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_a_right_kernel_passes(dtype, shape):
    assert passes(errors_of(splash.splash_path(interpret=True), dtype, shape=shape))


@dataclasses.dataclass(frozen=True)
class Broken:
    """Dense attention with one fault."""

    attention: object
    fault: str

    def attend(self, query, key, value):
        if self.fault == "key gradient":
            key = jax.lax.stop_gradient(key)
        if self.fault == "value gradient":
            value = value * 1.02 - jax.lax.stop_gradient(value * 0.02)
        mixed = self.attention.attend(query, key, value)
        if self.fault == "last row of a block":
            mixed = mixed.at[:, 127].mul(0.9)
        return mixed * jnp.nan if self.fault == "nan" else mixed


def broken(fault):
    def on_rows(visible, *, scale, cap):
        if fault == "scale":
            scale = scale * 1.03
        if fault == "cap":
            cap = None
        if fault == "window":
            visible = dataclasses.replace(visible, window=None)
        if fault == "prefix":
            visible = dataclasses.replace(visible, prefix_tokens=0)
        if fault == "range":
            visible = dataclasses.replace(visible, key_end=visible.key_end + 1)
        return Broken(DENSE.on_rows(visible, scale=scale, cap=cap), fault)

    return AttentionPath("splash", on_rows)


QUICK = [("scale", "bfloat16"), ("window", "float32"), ("key gradient", "float32"), ("nan", "float32")]
SLOW = [
    *(("prefix", "bfloat16"), ("range", "float32"), ("value gradient", "bfloat16")),
    *(("last row of a block", "bfloat16"), ("cap", "float32")),
]


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_broken_kernel_is_found(fault, dtype):
    architecture = dataclasses.replace(tiny.ARCHITECTURES["gemma"], attention_cap=2.0)
    errors = kernel_errors(broken(fault), tiny.make_mesh(), architecture, jnp.dtype(dtype))
    assert not passes(errors), errors


@pytest.fixture
def kernel(monkeypatch):
    """Puts a kernel in the place of splash on this CPU."""

    def put(path):
        monkeypatch.setattr(placement, "attention_name", lambda name, *_: "splash" if name == "auto" else name)
        for owner in (placement, check):
            monkeypatch.setattr(owner, "attention_path", lambda name, *_: path if name == "splash" else DENSE)

    return put


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return model_directory(root / "model"), preference_file(root / "train.jsonl", 8, seed=1)


def set_up_with(world, tmp_path, attention):
    setup, _, _ = tiny_setup(tmp_path, *world, mesh={"fsdp": 8})
    model = setup.config.model.model_copy(update={"attention": attention})
    config = setup.config.model_copy(update={"model": model})
    return setups.set_up(config, setup.model.directory)


def test_auto_takes_dense_in_place_of_a_kernel_that_is_wrong_here(world, tmp_path, kernel, caplog):
    kernel(broken("scale"))
    assert set_up_with(world, tmp_path, "auto").model.attention == "dense"
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith("model.attention=auto is dense here: the splash kernel differs from dense attention")
    assert "output" in said and "gradient of keys" in said and "allowed" in said


def test_a_kernel_that_was_named_is_refused_where_it_is_wrong(world, tmp_path, kernel):
    kernel(broken("key gradient"))
    with pytest.raises(UsageError, match=r"model\.attention=splash: the splash kernel differs .*; set it to dense"):
        set_up_with(world, tmp_path, "splash")


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, NotImplementedError, ValueError])
def test_a_kernel_that_does_not_run_is_wrong_too(world, tmp_path, kernel, caplog, kind):
    """The device's or its compiler's error; or one of lowering, which finds a shape or type that it does not take."""

    def on_rows(*_, **__):
        raise kind("INTERNAL: Mosaic failed to compile\nmore")

    kernel(AttentionPath("splash", on_rows))
    assert set_up_with(world, tmp_path, "auto").model.attention == "dense"
    assert "does not run on these devices (INTERNAL: Mosaic failed to compile)" in caplog.text


def test_a_right_kernel_is_kept_and_its_numbers_are_said(world, tmp_path, kernel, caplog):
    caplog.set_level(logging.INFO)
    kernel(AttentionPath("splash", partial(DENSE.on_rows)))
    assert set_up_with(world, tmp_path, "splash").model.attention == "splash"
    assert "attention splash against dense" in caplog.text
