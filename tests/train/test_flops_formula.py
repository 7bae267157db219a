"""The count of model flops, against a loop over every token of every sequence."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from sr_dpo_jax.parallel.chips import peak_flops
from sr_dpo_jax.train.flops import body_weights, pair_flops


def by_hand(architecture, prompt, chosen, rejected, prefix):
    """Token by token: weights it meets, keys it sees in each layer, logits it makes."""
    a, flops = architecture, 0
    sequence = [(prefix + i, False) for i in range(prompt)]
    sequence += [(prefix + prompt + i, True) for response in (chosen, rejected) for i in range(response)]
    for position, scored in sequence:
        flops += 2 * body_weights(a) + (2 * a.vocabulary_tokens * a.hidden if scored else 0)
        for number in a.kind_of_layer:
            window = a.kinds[number].window
            flops += 4 * a.heads * a.head_dim * (position + 1 if window is None else min(position + 1, window))
    return flops


@pytest.mark.parametrize("family", tiny.ARCHITECTURES)
@pytest.mark.parametrize("prefix", [0, 2, 9])
def test_pairs_token_by_token(family, prefix):
    lengths = np.array([(1, 1, 1), (5, 3, 4), (2, 7, 0), (12, 1, 6)])
    prompt, chosen, rejected = lengths.T
    ours = pair_flops(
        tiny.ARCHITECTURES[family],
        prompt_tokens=prompt,
        chosen_tokens=chosen,
        rejected_tokens=rejected,
        prefix_tokens=prefix,
    )
    assert ours.tolist() == [by_hand(tiny.ARCHITECTURES[family], *three, prefix) for three in lengths]


@pytest.mark.parametrize("family", tiny.ARCHITECTURES)
def test_body_weights_are_the_matrices_of_the_layers(family):
    shapes = jax.tree.leaves_with_path(tiny.build(tiny.ARCHITECTURES[family], tiny.make_mesh()).shapes["layers"])
    matrices = [leaf.size for path, leaf in shapes if "norm" not in path[-2].key and "bias" not in path[-1].key]
    assert body_weights(tiny.ARCHITECTURES[family]) == sum(matrices)


def test_peak():
    @dataclasses.dataclass(frozen=True)
    class Chip:
        device_kind: str

    assert peak_flops([Chip("TPU v5 lite")] * 4) == 4 * 197e12
    assert peak_flops(jax.devices()) is None
