"""Answers the harness's requests with the model on the mesh: log-likelihoods, rolling log-likelihoods, generation.

Texts become ids exactly as the harness's own `hf` model makes them, so that both give the same numbers: the tokenizer
adds its special tokens unless the text starts with BOS; spaces at the end of a context belong to the continuation;
context and continuation are tokenised as one and cut at the length of the context's ids; a text that is too long loses
its start. Every process runs the harness on all examples.

Next: `commands/lm_eval/continuations.py`, which scores continuations.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.commands.lm_eval.continuations import ContinuationScorer, Request
from sr_dpo_jax.data.model_ends import end_tokens
from sr_dpo_jax.durable.files import json_digest
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.generation.decode import Sampling
from sr_dpo_jax.generation.generator import Generator, Prompt, Settings
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.parallel.processes import require_same
from sr_dpo_jax.train.metrics import Progress
from sr_dpo_jax.train.setup import Setup

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256
"""The harness's own limit, for tasks that set none."""
GENERATION_KEYS = ("until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks")


class MeshLM(TemplateLM):
    """A model as the harness sees it."""

    def __init__(self, setup: Setup, params: Params, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.tokenizer = tokenizer
        self._model, self._slots, self._params = setup.model, setup.config.generation.slots, params
        self._scorer = ContinuationScorer(setup.model, setup.packing, params)
        self._end_tokens = end_tokens(tokenizer, setup.model.directory.path)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: BOS, or EOS where there is no BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self._model.architecture.context_tokens

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness keeps requests that went through this model's chat template."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation; without a generation prompt its last message is one that goes on."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        require_same({"the questions of the tasks": json_digest([ids for _, *ids in requests])})
        cut, sequences = 0, []
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)  # the last token is predicted and never read
            if not continuation or room < 1:
                raise UsageError(
                    f"a task asks for a continuation of {len(continuation)} tokens; the model takes 1 to "
                    f"{self.max_length} (max_position_embeddings)"
                )
            cut += len(context) > room
            sequences.append(Request(context[-room:], continuation))
        if cut:
            log.warning("%d of %d contexts are too long for the model and lose their start", cut, len(sequences))
        logprobs, greedy = self._scorer.scores(sequences, title="log-likelihoods")
        return list(zip(logprobs.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        require_same({"the questions of the tasks": json_digest([str(request.args) for request in requests])})
        groups: dict[Settings, list[int]] = {}  # requests that share their settings are generated together
        for number, request in enumerate(requests):
            groups.setdefault(self._settings(request), []).append(number)
        texts = [""] * len(requests)
        done = 0
        with Progress("generation", total=len(requests), active=jax.process_index() == 0) as progress:
            for settings, numbers in groups.items():
                contexts = {number: self._context(requests[number].args[0], settings) for number in numbers}
                prompts = [Prompt(number, ids, seed=number) for number, ids in contexts.items()]
                longest = max(len(prompt.ids) for prompt in prompts)
                generator = Generator(self._model, self.tokenizer, settings, longest_prompt_tokens=longest)
                for prompt, response in generator.respond(self._params, prompts):
                    texts[prompt.index] = response.text
                    done += 1
                    progress.update(done)
        return texts

    def _settings(self, request: Instance) -> Settings:
        wanted = normalize_gen_kwargs(request.args[1], DEFAULT_NEW_TOKENS)
        unknown = sorted(wanted.keys() - set(GENERATION_KEYS))
        if unknown:
            raise UsageError(
                f"task {request.task_name}: generation_kwargs {', '.join(unknown)}: not supported; known are "
                f"{', '.join(GENERATION_KEYS)}"
            )
        temperature = float(wanted.get("temperature", 0.0)) if wanted["do_sample"] else 0.0
        limits = (wanted.get("top_k"), wanted.get("top_p")) if temperature else (None, None)
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stop = tuple(dict.fromkeys(text for text in (*wanted["until"], end) if text))
        if not 0 < wanted["max_gen_toks"] < self.max_length:
            raise UsageError(
                f"task {request.task_name}: max_gen_toks={wanted['max_gen_toks']}: the model takes {self.max_length} "
                "tokens (max_position_embeddings), the prompt included"
            )
        sampling = Sampling(temperature, *limits, self._end_tokens)
        return Settings(sampling, self._slots, wanted["max_gen_toks"], stop, limit_key="max_gen_toks")

    def _context(self, text: str, settings: Settings) -> list[int]:
        bos = self.tokenizer.bos_token
        ids = self.tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos))
        if not ids:
            raise UsageError("a task generates from an empty prompt, which this tokenizer gives no token")
        return ids[-(self.max_length - settings.max_new_tokens) :]
