"""Checks that a tokenizer and its ids belong to the model: a wrong tokenizer trains without any error."""

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.model_ends import as_list, model_files
from sr_dpo_jax.data.tokens import uses_bos
from sr_dpo_jax.errors import UsageError


def require_fit(tokenizer: PreTrainedTokenizerBase, directory: Path, *, vocabulary_tokens: int) -> None:
    """Refuses a tokenizer that has `misfits`; all of them are named."""
    problems = misfits(tokenizer, directory, vocabulary_tokens=vocabulary_tokens)
    if problems:
        raise UsageError("\n  ".join([f"{directory}: the tokenizer does not fit the model:", *problems]))


def misfits(tokenizer: PreTrainedTokenizerBase, directory: Path, *, vocabulary_tokens: int) -> list[str]:
    """Lists every way in which a tokenizer does not fit the model, with its remedy.

    A model that names no EOS or BOS token takes any. Added tokens may lie beyond the embedding, as the image token of
    Gemma 3's text-only models does; `require_embedded` finds rows that use one.

    Args:
      tokenizer: as `tokens.load_tokenizer` gives it.
      directory: holds the model's config.json and, where it has one, generation_config.json.
      vocabulary_tokens: the rows of the model's embedding.

    Raises:
      UsageError: a file cannot be read.
    """
    config, generation = model_files(directory)
    problems = []
    spare = set(tokenizer.added_tokens_decoder) - {tokenizer.eos_token_id, tokenizer.bos_token_id}
    largest = max(set(tokenizer.get_vocab().values()) - spare)
    if largest >= vocabulary_tokens:
        problems.append(
            f"it has token id {largest}, but config.json says vocab_size={vocabulary_tokens}; use the tokenizer that "
            "belongs to the model"
        )
    known = as_list(config.get("eos_token_id")) + as_list(generation.get("eos_token_id"))
    if known and tokenizer.eos_token_id not in known:
        problems.append(
            f"its EOS token {tokenizer.eos_token!r} has id {tokenizer.eos_token_id}, but config.json and "
            f"generation_config.json say eos_token_id={sorted(set(known))}; correct eos_token in "
            "tokenizer_config.json, or, if the model was trained to end so, add the id to generation_config.json"
        )
    bos = config.get("bos_token_id")
    if bos is not None and uses_bos(tokenizer) and tokenizer.bos_token_id != bos:
        problems.append(
            f"it starts text with the BOS token {tokenizer.bos_token!r}, id {tokenizer.bos_token_id}, but config.json "
            f"says bos_token_id={bos}; correct bos_token in tokenizer_config.json, or the id in config.json"
        )
    return problems


def require_embedded(pairs: TokenizedPairs, *, vocabulary_tokens: int) -> None:
    """Refuses data with ids for which the model's embedding has no row.

    Raises:
      UsageError: names the first row that holds such an id by file and line, or p.
    """
    largest = int(pairs.augmentation.max(initial=0))
    if largest >= vocabulary_tokens:
        raise UsageError(
            f"refinement.prompt holds the added token of id {largest}, but the model has no more than "
            f"{vocabulary_tokens} ids; remove it"
        )
    beyond = np.flatnonzero(pairs.tokens >= vocabulary_tokens)
    if len(beyond):
        pair = int(np.searchsorted(pairs.offsets[:, 3], beyond[0], side="right"))
        raise UsageError(
            f"{pairs.place(pair)}: holds the added token of id {pairs.tokens[beyond[0]]}, but the model has no more "
            f"than {vocabulary_tokens} ids; remove it from the row or from the chat template"
        )
