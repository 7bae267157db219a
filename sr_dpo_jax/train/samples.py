"""Responses to the first held-out prompts while training, so that a person can read what the numbers stand for.

    samples.jsonl   one JSON line a response: step, set (`eval` or `eval/NAME`), id of the pair, prompt (as the model
                    reads it), response, finish_reason

The same prompts with the same seeds every time, so that what differs is the policy.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.generation.generator import Generator, Prompt, Settings
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.parallel.mesh import row_shards
from sr_dpo_jax.weights.placement import PlacedModel


@dataclasses.dataclass(frozen=True)
class _Asked:
    """One prompt of a held-out set."""

    set: str
    id: str
    prompt: Prompt
    text: str


class Samples:
    """The first prompts of every held-out set, and the compiled programs that respond to them.

    Args:
      model: the model on its mesh.
      eval_sets: the held-out sets by name.
      tokenizer: the model's.
      params: the policy's; only shapes and shardings count.
      count: prompts a set.
      seed: seeds the sampling.
      settings: how responses are drawn.
    """

    def __init__(
        self,
        model: PlacedModel,
        eval_sets: Mapping[str, TokenizedPairs],
        tokenizer: PreTrainedTokenizerBase,
        params: Params,
        *,
        count: int,
        seed: int,
        settings: Settings,
    ):
        self._asked: list[_Asked] = []
        for name, pairs in eval_sets.items():
            for place in range(min(count, len(pairs))):
                index, ids = len(self._asked), pairs.pair(place)[0].tolist()
                prompt = Prompt(index, ids, seed=(seed * 1_000_003 + index) % 2**32)
                self._asked.append(_Asked(name, pairs.ids[place], prompt, tokenizer.decode(ids)))
        shards = row_shards(model.mesh)
        slots = -(-min(settings.slots, len(self._asked)) // shards) * shards
        longest = max(len(asked.prompt.ids) for asked in self._asked)
        settings = dataclasses.replace(settings, slots=slots)
        self._generator = Generator(model, tokenizer, settings, longest_prompt_tokens=longest)
        self._generator.compile(params)

    def responses(self, params: Params, progress: Callable[[], None]) -> list[dict[str, Any]]:
        """Gives the lines of samples.jsonl of one step, without the step; all processes take part and get the same."""
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
