"""Counts from the text of TPU programs whose figures are known by hand, and flops of traced programs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from sr_dpo_jax.batch import Batch, Rows
from sr_dpo_jax.commands.compile.hlo import read
from sr_dpo_jax.commands.compile.programs import bytes_wanted, share_visited
from sr_dpo_jax.commands.compile.traced_flops import splash_flops, traced_flops
from sr_dpo_jax.model.kernels.splash import splash_path
from sr_dpo_jax.train.train_step import make_train_step

LOOPS = """HloModule jit_step, is_scheduled=true

%inner_cond (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(9)
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

%inner_body (state.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %two = s32[]{:T(128)} constant(2)
  %state.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %copied = s32[]{:T(128)} copy(%count.1)
  %value = f32[8]{0:T(128)S(1)} get-tuple-element(%state.1), index=1
  %next = s32[]{:T(128)} add(%copied, %two)
  %permute-start = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}) collective-permute-start(%value), channel_id=1
  %permute-done = f32[8]{0:T(128)S(1)} collective-permute-done(%permute-start)
  %fused = f32[8]{0} fusion(%permute-done), kind=kLoop, calls=%work, backend_config={"estimated_cycles":"10"}
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%next, %fused)
}

%work (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %twice.remat = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"1000"}
}

%gather_part (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=7, dimensions={0}
}

%outer_cond (state.2: (s32[], f32[8], s32[])) -> pred[] {
  %state.2 = (s32[], f32[8], /*index=2*/s32[]) parameter(0)
  %count.2 = s32[] get-tuple-element(%state.2), index=0
  %limit.2 = s32[] constant(5)
  ROOT %less.2 = pred[] compare(%count.2, %limit.2), direction=LT
}

%outer_body (state.3: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %state.3 = (s32[], f32[8], /*index=2*/s32[]) parameter(0)
  %count.3 = s32[] get-tuple-element(%state.3), index=0
  %value.3 = f32[8] get-tuple-element(%state.3), index=1
  %handed = s32[] get-tuple-element(%state.3), index=2
  %one = s32[] constant(1)
  %next.3 = s32[] add(%count.3, %one)
  %start.3 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%handed, %value.3)
  %inner = (s32[], f32[8]) while(%start.3), condition=%inner_cond, body=%inner_body
  %out = f32[8] get-tuple-element(%inner), index=1
  %gather-a = bf16[16,8]{1,0} fusion(%w), kind=kCustom, calls=%gather_part, backend_config={"estimated_cycles":"3"}
  %gather-b = bf16[16,8]{1,0} fusion(%w), kind=kCustom, calls=%gather_part
  ROOT %tuple.3 = (s32[], f32[8], s32[]) tuple(%next.3, %out, %handed)
}

ENTRY %main (a: f32[8], q: bf16[4,256,64], w.1: bf16[4,8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %q = bf16[4,256,64]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %minus = s32[] constant(1)
  %start = (s32[], f32[8], s32[]) tuple(%zero, %a, %minus)
  %outer = (s32[], f32[8], s32[]) while(%start), condition=%outer_cond, body=%outer_body
  %tables = s32[1,1,1]{2,1,0} constant(0)
  %splash_mha_fwd_residuals.1 = (f32[256,128]{1,0}, bf16[4,256,64]{2,1,0}) custom-call(%tables, %q), custom_call_target="tpu_custom_call", backend_config={
  "kernel": {
}}, metadata={op_name="attend"}
  %mystery.2 = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"
  %add.remat2 = f32[8]{0} add(%a, %a), backend_config={"estimated_cycles":"7"}
  %scattered = f32[2]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %done = f32[8]{0} get-tuple-element(%outer), index=1
}

%all-reduce-scatter.1 (p.2: f32[8]) -> f32[2] {
  %p.2 = f32[8]{0} parameter(0)
  %all-reduce.9 = f32[8]{0} all-reduce(%p.2), channel_id=9
  ROOT %slice.9 = f32[2]{0} slice(%all-reduce.9), slice={[0:2]}
}
"""  # noqa: E501 (as the compiler writes it)


def test_loops_are_multiplied_out():
    """Outer loop: 0, 1, ... below 5; inner: from 1, handed on by the outer, by 2, below 9: 5 × 4 runs."""
    tally = read(LOOPS)
    assert tally.cycles == 5 * (4 * 10 + 3) + 7
    assert tally.unknown_loops == 0
    assert tally.counts == {"collective-permute": 20, "all-gather": 5, "reduce-scatter": 1}
    assert tally.payload_bytes == {"collective-permute": 20 * 32, "all-gather": 5 * 256, "reduce-scatter": 32}
    assert tally.kernel_flops == splash_flops("fwd", (4, 256, 64)) == 2 * 2 * 4 * 256 * 256 * 64
    assert tally.unknown_kernels == {"mystery.2": 1}
    assert tally.repeated_operations == 1


def test_a_renamed_kernel_is_known_by_its_metadata():
    text = LOOPS.replace("%splash_mha_fwd_residuals.1", "%closed_call.1").replace(
        "attend", "a/splash_mha_fwd_residuals/b"
    )
    assert read(text).kernel_flops == read(LOOPS).kernel_flops


def test_what_a_sparse_core_runs_ends_where_it_ends():
    """The compiler writes the thread of such a computation behind its end."""
    end = '  ROOT %twice.remat = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"1000"}\n}'
    assert end in LOOPS
    assert read(LOOPS.replace(end, f'{end}, execution_thread="sparsecore"')) == read(LOOPS)


def test_a_known_trip_count_is_taken():
    text = LOOPS.replace("body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"11"}}')
    assert read(text).cycles == 11 * (4 * 10 + 3) + 7


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%limit = s32[]{:T(128)} constant(9)", "%limit = s32[]{:T(128)} parameter(1)"),
        ("compare(%count, %limit), direction=LT", "compare(%count, %limit), direction=NE"),
        ("%two = s32[]{:T(128)} constant(2)", "%two = s32[]{:T(128)} parameter(1)"),
        ("tuple(%next.3, %out, %handed)", "tuple(%next.3, %out, %next.3)"),
    ],
)
def test_a_loop_of_unknown_length_is_counted_once_and_said(old, new):
    tally = read(LOOPS.replace(old, new))
    assert tally.unknown_loops == 1
    assert tally.cycles == 5 * (10 + 3) + 7


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (45.87G) "
            "exceeds available HBM (15.75G).",
            45.87 + 2,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.5T of 95.74G hbm. Exceeded ...", 1536),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 130.2M of 128.00M vmem.", None),
        ("INTERNAL: Mosaic failed to compile TPU kernel", None),
    ],
)
def test_what_the_compiler_refuses(message, gib):
    assert bytes_wanted(message, 2 * 2**30) == (None if gib is None else int(gib * 2**30))


def traced_step(attention, objective, remat="none", *, online=False):
    """Traced flops of a train step of two devices, 4 rows of 128 tokens, 24 scored, p of 16 tokens; and its batch."""
    mesh = tiny.make_mesh(fsdp=2)
    path = tiny.DENSE
    if attention == "splash":
        path = splash_path(interpret=True)
    model = tiny.build(tiny.NEOX, mesh, attention=path, remat=remat)
    optimizer = optax.sgd(lambda _: 1.0)
    step = make_train_step(
        model.graph,
        optimizer,
        lambda step: jnp.float32(1.0),
        tiny.objective_of(objective),
        pairs=8,
        mesh=mesh,
        abstract=model.abstract_state(optimizer),
    )

    def rows(length, prefix_tokens):
        whole, scored = (jax.ShapeDtypeStruct((2, 2, size), jnp.int32) for size in (length, 24))
        return Rows(whole, whole, whole, whole, scored, scored, scored, prefix_tokens=prefix_tokens)

    scores = None if online else jax.ShapeDtypeStruct((8, 2), jnp.float32)
    refined = objective == "sr_dpo"
    batch = Batch(rows(128, 0), rows(144, 16) if refined else None, scores, scores if refined else None)
    reference = model.shapes if online else None
    return traced_flops(step.trace(model.abstract_state(optimizer), None, reference, batch).jaxpr.jaxpr), batch


def parts(length):
    """Flops of one forward over 4 rows of this length: layers' weights, attention, unembedding."""
    a = tiny.NEOX
    weights = a.layers * (4 * a.hidden * a.heads * a.head_dim + 2 * a.hidden * a.mlp)
    attention = 4 * a.layers * a.heads * a.head_dim * 4 * length**2
    return 2 * weights * 4 * length, attention, 2 * a.vocabulary_tokens * a.hidden * 4 * 24


def test_traced_flops_are_the_formula():
    """Forward, twice that backward, and the logits once more, since none are kept; p costs one forward."""
    weights, attention, head = parts(128)
    dpo = 3 * (weights + attention) + 4 * head
    assert traced_step("dense", "dpo")[0].matmuls == pytest.approx(dpo, rel=1e-6)
    assert traced_step("dense", "sr_dpo")[0].matmuls == pytest.approx(dpo + sum(parts(144)), rel=1e-6)


def test_traced_flops_count_what_is_recomputed():
    full, none = (traced_step("dense", "dpo", remat)[0].matmuls for remat in ("full", "none"))
    weights, attention, _ = parts(128)
    assert 0.6 * (weights + attention) < full - none <= weights + attention


def test_kernels_are_counted_apart():
    """Rows with p are filled up to 256 tokens. Scores and mix forward, seven matmuls backward and, outside the kernels,
    the product of the output with its gradient."""
    a = tiny.NEOX
    matmul = 2.0 * a.layers * a.heads * a.head_dim * 4
    weights, _, head = parts(128)
    flops, _ = traced_step("splash", "sr_dpo")
    assert flops.kernels == pytest.approx(matmul * (9 * 128**2 + 2 * 256**2))
    weights_with_p, _, head_with_p = parts(144)
    outside = 3 * weights + 4 * head + matmul * 128 + weights_with_p + head_with_p
    assert flops.matmuls == pytest.approx(outside, rel=1e-6)


@pytest.mark.parametrize(("remat", "online"), [("none", False), ("full", False), ("none", True)])
def test_each_kind_of_rows_has_its_own_share_of_visited_blocks(remat, online):
    """Plain rows go through nine matmuls, two more where layers are recomputed and two for an online reference; those
    with p go through two a model."""
    visited = {"plain": 0.25, "augmented": 0.5}
    matmul = 2.0 * tiny.NEOX.layers * tiny.NEOX.heads * tiny.NEOX.head_dim * 4
    flops, batch = traced_step("splash", "sr_dpo", remat, online=online)
    models = 2 if online else 1
    plain, augmented = (9 + 2 * (remat == "full") + 2 * (models - 1)) * matmul * 128**2, models * 2 * matmul * 256**2
    assert flops.kernels == pytest.approx(plain + augmented)
    share = share_visited(tiny.NEOX, batch, models=models, kernels=flops.kernels, visited=visited)
    assert share * flops.kernels == pytest.approx(0.25 * plain + 0.5 * augmented)


def test_a_program_without_augmented_rows_has_the_share_of_plain_ones():
    """An evaluation runs over rows with p; the train step of DPO beside it does not."""
    flops, batch = traced_step("splash", "dpo")
    visited = {"plain": 0.25, "augmented": 0.5}
    assert share_visited(tiny.NEOX, batch, models=1, kernels=flops.kernels, visited=visited) == 0.25


def test_an_unknown_kernel_is_refused():
    import jax.experimental.pallas as pl

    def copy(source, target):
        target[...] = source[...]

    jaxpr = jax.make_jaxpr(pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct((8,), jnp.float32), interpret=True))
    with pytest.raises(ValueError, match="nothing is known"):
        traced_flops(jaxpr(np.zeros(8, np.float32)).jaxpr)
