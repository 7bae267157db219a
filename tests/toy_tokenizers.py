"""Tiny tokenizers and chat templates, made on the spot, saved as Hugging Face directories."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ENGLISH = tuple(
    f"\n\nHuman: {question} {thing}?\n\nAssistant: {answer} the {thing} is {colour}."
    for question in ("What is the", "Where is a", "Please tell me about the", "How do I find the usefulness of a")
    for answer in ("I think", "You are right,", "It is harmless:", "Sorry, but")
    for thing in ("sky", "cat", "red car", "response", "query")
    for colour in ("blue", "green", "far away")
)

_TURN = "{% for m in messages %}"
ZEPHYR = (
    _TURN + "{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CHATML = (
    _TURN + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}" + _TURN + "{{ '<|start|>' + m['role'] + '<|stop|>\\n\\n' + (m['content'] | trim) + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + _TURN
    + "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<turn>' + role + '\\n' + (m['content'] | trim) + '<end>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"
)


def byte_level_tokenizer(
    directory: Path,
    *,
    vocabulary_tokens: int = 384,
    texts: Sequence[str] = ENGLISH,
    bos: bool = False,
    append_eos: bool = False,
    chat_template: str | None = None,
    special_tokens: Sequence[str] = (),
) -> Path:
    """Saves a byte-level BPE trained on `texts`; returns `directory`, which `load_tokenizer` loads.

    Ids: `</s>` 0 (EOS, and PAD as well), `<s>` 1, then `special_tokens`, then the 256 bytes, then the merges.

    Args:
      directory: where to; made if need be.
      vocabulary_tokens: most entries of the vocabulary, at least 258 + the special tokens.
      texts: what merges are learnt from.
      bos: whether a post-processor puts `<s>` before every text.
      append_eos: whether a post-processor puts `</s>` after every text.
      chat_template: Jinja source.
      special_tokens: more tokens that are never split, such as a template's.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_tokens,
        special_tokens=["</s>", "<s>", *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    _post_process(backend, bos=bos, append_eos=append_eos)
    return _save(backend, directory, chat_template)


def merging_tokenizer(directory: Path) -> Path:
    """Saves the tokenizer of `</s>` 0, `<s>` 1, a 2, b 3 and ab 4, where "ab" is one token: the seam trap."""
    vocabulary = {"</s>": 0, "<s>": 1, "a": 2, "b": 3, "ab": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.add_special_tokens(["</s>", "<s>"])
    return _save(backend, directory, None)


def word_tokenizer(
    directory: Path, vocabulary: Mapping[str, int], *, bos: bool = False, chat_template: str | None = None
) -> Path:
    """Saves a tokenizer of whole words between spaces, which are dropped; the vocabulary needs </s>, <s> and <unk>."""
    backend = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>", "<s>"])
    _post_process(backend, bos=bos, append_eos=False)
    return _save(backend, directory, chat_template)


def dummy_prefix_tokenizer(directory: Path, *, chat_template: str | None = None) -> Path:
    """Saves a tokenizer that, as those of Llama 2 and Mistral do, puts a space before any text; uses BOS."""
    alphabet = sorted(set("".join(ENGLISH).replace(" ", "") + "<|>"))
    vocabulary = {token: number for number, token in enumerate(["</s>", "<s>", "<unk>", "▁", "▁S", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "S")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens(["</s>", "<s>"])
    _post_process(backend, bos=True, append_eos=False)
    return _save(backend, directory, chat_template)


def _post_process(backend: Tokenizer, *, bos: bool, append_eos: bool) -> None:
    if bos or append_eos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if append_eos else ''}",
            special_tokens=[(token, backend.token_to_id(token)) for token in ("</s>", "<s>")],
        )


def _save(backend: Tokenizer, directory: Path, chat_template: str | None) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=AddedToken("</s>", normalized=False),
        bos_token=AddedToken("<s>", normalized=False),
        pad_token=AddedToken("</s>", normalized=False),
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return Path(directory)
