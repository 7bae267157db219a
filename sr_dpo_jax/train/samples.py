"""Responses to the first held-out prompts while training, so that a person can read what the numbers stand for.

    samples.jsonl   one JSON line a response: step, set (`eval` or `eval/NAME`), id of the pair, prompt (as the model
                    reads it), response, finish_reason

The same prompts with the same seeds every time, so that what differs is the policy. Next: `generate.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.generation.generator import Prompt, make_generator
from sr_dpo_jax.parallel import mesh as meshes
from sr_dpo_jax.train.train_step import Params
from sr_dpo_jax.weights.placement import Assembly


@dataclasses.dataclass(frozen=True)
class _Asked:
    """One prompt, and where it is from."""

    set: str
    id: str
    prompt: Prompt
    text: str


class Samples:
    """The first prompts of every held-out set, and the compiled programs that respond to them.

    Args:
      assembly: model and mesh.
      eval_sets: the held-out sets by name.
      tokenizer: of the model.
      params: of the policy; only shapes and shardings count.
    """

    def __init__(
        self,
        assembly: Assembly,
        eval_sets: Mapping[str, TokenizedPairs],
        tokenizer: PreTrainedTokenizerBase,
        params: Params,
    ):
        config = assembly.config
        self._asked: list[_Asked] = []
        for name, pairs in eval_sets.items():
            for place in range(min(config.train.samples, len(pairs))):
                index, ids = len(self._asked), pairs.pair(place)[0].tolist()
                prompt = Prompt(index, 0, ids, seed=(config.seed * 1_000_003 + index) % 2**32)
                self._asked.append(_Asked(name, pairs.ids[place], prompt, tokenizer.decode(ids)))
        shards = meshes.row_shards(assembly.mesh)
        slots = -(-min(config.generation.slots, len(self._asked)) // shards) * shards
        longest = max(len(asked.prompt.ids) for asked in self._asked)
        self._generator = make_generator(assembly, tokenizer, longest, slots=slots)
        self._generator.compile(params)

    def responses(self, params: Params, progress: Callable[[], None]) -> list[dict[str, Any]]:
        """The lines of samples.jsonl of one step, without the step; all processes take part and get the same."""
        found = {}
        for prompt, response in self._generator.respond(params, [asked.prompt for asked in self._asked]):
            asked = self._asked[prompt.index]
            found[prompt.index] = {
                "set": asked.set,
                "id": asked.id,
                "prompt": asked.text,
                "response": response.text,
                "finish_reason": response.finish_reason,
            }
            progress()
        return [found[index] for index in sorted(found)]
