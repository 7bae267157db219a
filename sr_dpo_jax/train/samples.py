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
from sr_dpo_jax.data.plan import round_up
from sr_dpo_jax.generation.generator import Generator, Prompt, Settings
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.parallel.mesh import row_shards
from sr_dpo_jax.weights.placement import PlacedModel


class Samples:
    """The first `count` prompts of every held-out set, and the compiled programs that respond to them.

    Of `params`, the policy's, only shapes and shardings count.
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
        self._prompts: list[Prompt] = []
        self._lines: list[dict[str, str]] = []
        for name, pairs in eval_sets.items():
            for place in range(min(count, len(pairs))):
                index, ids = len(self._prompts), pairs.pair(place)[0].tolist()
                self._prompts.append(Prompt(index, ids, seed=(seed * 1_000_003 + index) % 2**32))
                self._lines.append({"set": name, "id": pairs.ids[place], "prompt": tokenizer.decode(ids)})
        slots = round_up(min(settings.slots, len(self._prompts)), row_shards(model.mesh))
        longest = max(len(prompt.ids) for prompt in self._prompts)
        settings = dataclasses.replace(settings, slots=slots)
        self._generator = Generator(model, tokenizer, settings, longest_prompt_tokens=longest)
        self._generator.compile(params)

    def responses(self, params: Params, progress: Callable[[], None]) -> list[dict[str, Any]]:
        """Gives the lines of samples.jsonl of one step, without the step; all processes take part and get the same."""
        found = {}
        for prompt, response in self._generator.respond(params, self._prompts):
            answer = {"response": response.text, "finish_reason": response.finish_reason}
            found[prompt.index] = self._lines[prompt.index] | answer
            progress()
        return [found[index] for index in sorted(found)]
