"""Tiny tokenizers and chat templates, made on the spot, saved as Hugging Face directories."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

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
_ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, ...') }}{% endif %}"
)
_SPLIT_SYSTEM = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{% set turns = messages[1:] if system is not none else messages %}"
)
# BOS before every user turn; the system message within the first; contents trimmed; no generation prompt.
LLAMA2 = (
    _SPLIT_SYSTEM + "{% for m in turns %}" + _ALTERNATE + "{% if m['role'] == 'user' %}"
    "{% set start = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system is not none else '' %}"
    "{{ bos_token + '[INST] ' + (start + m['content']) | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# A system header with two dates in front of everything, whether or not there is a system message.
LLAMA31 = (
    _SPLIT_SYSTEM
    + "{{ bos_token + '<|start|>system<|stop|>\\n\\nKnows the world up to May 2023.\\nThe date: 1 June 2024.\\n\\n' }}"
    "{{ (system or '') | trim + '<|eot|>' }}{% for m in turns %}"
    "{{ '<|start|>' + m['role'] + '<|stop|>\\n\\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}"
)
# Spaces inside the brackets; EOS after each response; a system message only before a user turn that comes last.
MISTRAL = (
    _SPLIT_SYSTEM + "{{ bos_token }}{% for m in turns %}" + _ALTERNATE + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\\n\\n' if loop.last and system is not none else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# A default system message where none is given.
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a toy.<|im_end|>\\n' }}{% endif %}"
    + CHATML
)
# Thoughts of turns before the last question are dropped; the last turn has a block of thought, be it empty.
QWEN3 = (
    "{% set last = namespace(question=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}"
    "{% if loop.index0 > last.question %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\\n') }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
# The generation prompt opens the block of thought.
QWEN3_THINKING = QWEN3[: QWEN3.index("{% if enable_thinking")] + "{{ '<think>\\n' }}{% endif %}"
# The system message within the first user turn.
GEMMA3 = (
    _SPLIT_SYSTEM
    + "{{ bos_token }}{% for m in turns %}"
    + _ALTERNATE
    + "{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{{ (system + '\\n\\n' if loop.first and system is not none else '') + m['content'] | trim + '<end>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"
)
# EOS once, after the end of the whole conversation.
PHI3 = (
    _TURN + "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI3_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# Starts with the BOS token, which is the EOS token; the newline after a response is left out at the end.
OLMO2 = (
    "{{ bos_token }}" + _TURN + "{{ '<|' + m['role'] + '|>\\n' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}{{ '\\n' if m['role'] != 'assistant' or not loop.last }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class ChatFamily:
    """A template in the manner of a model family, with the kind of tokenizer that the family has."""

    template: str
    special_tokens: tuple[str, ...] = ()
    bos: bool = False
    """Whether a post-processor puts BOS before every text."""
    eos_token: str = "</s>"
    bos_token: str = "<s>"
    dummy_prefix: Literal["first", "always"] | None = None
    """A space before a text, or before a text and after every special token; None: byte-level."""


CHAT_FAMILIES = {
    "llama2": ChatFamily(LLAMA2, bos=True, dummy_prefix="first"),
    "llama3": ChatFamily(LLAMA3, ("<|start|>", "<|stop|>", "<|eot|>"), bos=True, eos_token="<|eot|>"),
    "llama31": ChatFamily(LLAMA31, ("<|start|>", "<|stop|>", "<|eot|>"), bos=True, eos_token="<|eot|>"),
    "mistral": ChatFamily(MISTRAL, bos=True, dummy_prefix="always"),
    "zephyr": ChatFamily(ZEPHYR, bos=True, dummy_prefix="always"),
    "qwen25": ChatFamily(QWEN25, ("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>"),
    "qwen3": ChatFamily(QWEN3, ("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>"),
    "qwen3_thinking": ChatFamily(QWEN3_THINKING, ("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>"),
    "gemma2": ChatFamily(GEMMA, ("<turn>", "<end>"), bos=True),
    "gemma3": ChatFamily(GEMMA3, ("<turn>", "<end>"), bos=True),
    "phi3": ChatFamily(PHI3, PHI3_TOKENS, dummy_prefix="always"),
    "phi3_first": ChatFamily(PHI3, PHI3_TOKENS, dummy_prefix="first"),
    "olmo2": ChatFamily(OLMO2, bos_token="</s>"),
}


def chat_tokenizer(directory: Path, name: str, *, vocabulary_tokens: int = 384) -> Path:
    """Saves the tokenizer of a chat family; `vocabulary_tokens` is for byte-level ones."""
    family = CHAT_FAMILIES[name]
    names = {"eos_token": family.eos_token, "bos_token": family.bos_token}
    if family.dummy_prefix is None:
        return byte_level_tokenizer(
            directory,
            vocabulary_tokens=vocabulary_tokens,
            bos=family.bos,
            chat_template=family.template,
            special_tokens=family.special_tokens,
            **names,
        )
    return dummy_prefix_tokenizer(
        directory,
        scheme=family.dummy_prefix,
        bos=family.bos,
        chat_template=family.template,
        special_tokens=family.special_tokens,
        **names,
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
    eos_token: str = "</s>",
    bos_token: str = "<s>",
) -> Path:
    """Saves a byte-level BPE trained on `texts`; returns `directory`, which `load_tokenizer` loads.

    Ids: `</s>` 0 (PAD, and by default EOS), `<s>` 1, then `special_tokens`, then the 256 bytes, then the merges.

    Args:
      directory: where to; made if need be.
      vocabulary_tokens: most entries of the vocabulary, at least 258 + the special tokens.
      texts: what merges are learnt from.
      bos: whether a post-processor puts `<s>` before every text.
      append_eos: whether a post-processor puts `</s>` after every text.
      chat_template: Jinja source.
      special_tokens: more tokens that are never split, such as a template's.
      eos_token, bos_token: which tokens are EOS and BOS.
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
    return _save(backend, directory, chat_template, eos_token=eos_token, bos_token=bos_token)


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


def dummy_prefix_tokenizer(
    directory: Path,
    *,
    scheme: Literal["first", "always"] = "always",
    bos: bool = True,
    chat_template: str | None = None,
    special_tokens: Sequence[str] = (),
    eos_token: str = "</s>",
    bos_token: str = "<s>",
) -> Path:
    """Saves a tokenizer that, as SentencePiece does, puts a space before any text; its one merge is that of "▁S".

    Args:
      directory: where to; made if need be.
      scheme: `first` puts it before the text alone, as Llama 2 does, `always` after special tokens too, as Mistral and
        Phi-3 do.
      bos: whether a post-processor puts BOS before every text.
      chat_template: Jinja source.
      special_tokens: more tokens that are never split; they swallow whitespace after them, as those of Phi-3.
      eos_token, bos_token: which tokens are EOS and BOS.
    """
    alphabet = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = ["</s>", "<s>", "<unk>", "▁", "▁S", "\n", *alphabet, *special_tokens]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "S")], unk_token="<unk>"))
    if scheme == "always":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens(["</s>", "<s>", *(AddedToken(token, rstrip=True) for token in special_tokens)])
    _post_process(backend, bos=bos, append_eos=False)
    return _save(backend, directory, chat_template, eos_token=eos_token, bos_token=bos_token)


def _post_process(backend: Tokenizer, *, bos: bool, append_eos: bool) -> None:
    if bos or append_eos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if append_eos else ''}",
            special_tokens=[(token, backend.token_to_id(token)) for token in ("</s>", "<s>")],
        )


def _save(
    backend: Tokenizer,
    directory: Path,
    chat_template: str | None,
    *,
    eos_token: str = "</s>",
    bos_token: str = "<s>",
) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=AddedToken(eos_token, normalized=False),
        bos_token=AddedToken(bos_token, normalized=False),
        pad_token=AddedToken("</s>", normalized=False),
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return Path(directory)
