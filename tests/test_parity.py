"""Against PyTorch: our scores of real pairs, and the weights that we write, in the hands of transformers."""

import gzip
import json

import numpy as np
import pytest
import yaml
from runs import HH_FILE, make_config, model_directory, preference_file, raw_config

from sr_dpo_jax.cli import main
from sr_dpo_jax.config import PAPER_PROMPT
from sr_dpo_jax.data.tokens import load_tokenizer
from sr_dpo_jax.loop import train

pytestmark = pytest.mark.parity
FAMILIES = {
    "gpt_neox": {"rotary_pct": 0.25},
    "llama": {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "tie_word_embeddings": True},
}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="pip install -e '.[parity]'")


def random_weights(torch, directory):
    """Weights of standard deviation 0.08: far from uniform predictions, so that an error shows."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    config.initializer_range = 0.08
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def response_logprob(torch, model, prompt, response):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(logprobs.gather(-1, torch.tensor(response)[:, None]).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_score_equals_pytorch_on_200_hh_pairs(torch, tmp_path, family):
    """Every log-probability within 2e-3 nats, plain and augmented; the ids are made here from the rules alone."""
    if not HH_FILE.exists():
        pytest.skip(f"REAL DATA IS ABSENT: {HH_FILE}")
    directory = model_directory(
        tmp_path / "model", family, vocabulary_tokens=1200, hidden_size=64, num_hidden_layers=3, **FAMILIES[family]
    )
    model = random_weights(torch, directory)
    data = tmp_path / "pairs.jsonl"
    with gzip.open(HH_FILE) as rows:
        data.write_bytes(b"".join(row for _, row in zip(range(216), rows, strict=False)))
    raw = raw_config(
        tmp_path,
        directory,
        data,
        model={"init": "pretrained"},
        data={"format": "hh_rlhf", "max_length": 512, "max_prompt_length": 256, "max_bad_rows": 16},
        refinement={"prompt": PAPER_PROMPT},
        batch={"pairs_per_step": 32, "row_length": 1024},
    )
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert main(["score", str(config), "--output", str(tmp_path / "scores.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()][:200]
    assert len(lines) == 200
    rows = data.read_text(encoding="utf-8").splitlines()
    tokenizer = load_tokenizer(str(directory))

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head = [tokenizer.bos_token_id] if family == "llama" else []
    p, eos = ids(PAPER_PROMPT), tokenizer.eos_token_id
    worst = 0.0
    for line in lines:
        row = json.loads(rows[int(line["id"])])
        cut = row["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")
        rest = ids(row["chosen"][:cut])
        responses = {side: [*ids(row[side][cut:]), eos] for side in ("chosen", "rejected")}
        if len(head) + len(rest) + max(map(len, responses.values())) > 512:
            rest = rest[-(256 - len(head)) :]
            if 256 + max(map(len, responses.values())) > 512:
                responses = {side: response[:256] for side, response in responses.items()}
        for side, response in responses.items():
            assert line[f"{side}_tokens"] == len(response)
            for suffix, prompt in (("", head + rest), ("_augmented", head + p + rest)):
                expected = response_logprob(torch, model, prompt, response)
                worst = max(worst, abs(line[f"logp_{side}{suffix}"] - expected))
    assert worst < 2e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_checkpoint_scores_the_same_in_pytorch(torch, tmp_path, family):
    import transformers

    directory = model_directory(tmp_path / "model", family, **FAMILIES[family])
    random_weights(torch, directory)
    data = preference_file(tmp_path / "pairs.jsonl", 16)
    config = make_config(
        tmp_path, directory, data, model={"init": "pretrained"}, optimizer={"learning_rate": 1e-2}, seed=3
    )
    assert train(config) == 0
    exported = tmp_path / "exported"
    assert main(["export", config.output_dir, str(exported)]) == 0
    scored = make_config(tmp_path / "again", exported, data, model={"init": "pretrained"})
    (tmp_path / "again.yaml").write_text(scored.to_yaml(), encoding="utf-8")
    assert main(["score", str(tmp_path / "again.yaml"), "--output", str(tmp_path / "scores.jsonl")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    before = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = load_tokenizer(str(exported))
    moved = []
    for line, row in zip(
        (tmp_path / "scores.jsonl").read_text().splitlines(), data.read_text().splitlines(), strict=True
    ):
        line, row = json.loads(line), json.loads(row)
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        prompt = [tokenizer.bos_token_id, *prompt] if family == "llama" else prompt
        response = [*tokenizer(row["chosen"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        expected = response_logprob(torch, model, prompt, response)
        assert line["logp_chosen"] == pytest.approx(expected, abs=1e-3)
        moved.append(abs(expected - response_logprob(torch, before, prompt, response)))
    assert np.mean(moved) > 0.1, "the checkpoint's weights were exported, not the base model's"
