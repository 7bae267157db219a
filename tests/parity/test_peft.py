"""LoRA adapters against PEFT and TRL in PyTorch: logits, files both ways, and five steps of training."""

import json

import numpy as np
import pytest
from runs import make_config, metrics_of, model_directory, preference_file
from safetensors.numpy import load_file
from test_parity import response_logprob
from torch_models import random_weights

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.export import export
from sr_dpo_jax.train.loop import train

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("same_programs")]

LORA = {"rank": 4, "alpha": 8.0}
FAMILIES = {"llama": {"num_key_value_heads": 2}, "gpt_neox": {}, "phi3": {"num_key_value_heads": 2, "pad_token_id": 0}}
"""Of the last two, one interleaves three matrices in a tensor, and one puts them one after the other."""
FILE = "adapter_model.safetensors"


@pytest.fixture
def torch():
    pytest.importorskip("peft", reason="pip install -e '.[parity]'")
    return pytest.importorskip("torch", reason="pip install -e '.[parity]'")


def config_of(root, model, data, start=None, **sections):
    lora = {**LORA, **sections.pop("lora", {}), "start": None if start is None else str(start)}
    objective = {"name": "dpo", "lam": None}
    return make_config(root, model, data, model={"init": "pretrained"}, objective=objective, lora=lora, **sections)


def made(torch, root, family):
    """A model of random weights, 8 pairs, and an adapter that PEFT has made and whose factors are both random."""
    import peft

    model = model_directory(root / "model", family, **FAMILIES[family])
    theirs = random_weights(torch, model)
    form = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    peft.get_peft_model(theirs, form, adapter_name="default").save_pretrained(root / "adapter")
    return model, preference_file(root / "pairs.jsonl", 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_peft_come_and_go(torch, tmp_path, family):
    """Log-probs as PEFT's in both directions, and merged ones; where matrices have modules of their own, the file that
    comes back is bit for bit the one that went in."""
    import peft
    import transformers

    model, data = made(torch, tmp_path, family)
    barely = {"optimizer": {"learning_rate": 2e-37, "warmup_steps": 0}, "train": {"max_steps": 1}}
    config = config_of(tmp_path, model, data, tmp_path / "adapter", **barely)
    (tmp_path / "score.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert main(["score", str(tmp_path / "score.yaml"), "--output", str(tmp_path / "scores.jsonl")]) == 0
    assert train(config) == 0
    export(tmp_path / "run", tmp_path / "again")
    export(tmp_path / "run", tmp_path / "merged", merge=True)
    if family == "llama":
        ours, given = (load_file(tmp_path / name / FILE) for name in ("again", "adapter"))
        assert ours.keys() == given.keys()
        assert all(ours[name].tobytes() == given[name].tobytes() for name in given)
    load = transformers.AutoModelForCausalLM.from_pretrained
    adapted = [peft.PeftModel.from_pretrained(load(model), tmp_path / name).eval() for name in ("adapter", "again")]
    whole = load(tmp_path / "merged").eval()
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        first, second, third = (one(ids).logits for one in (*adapted, whole))
        plain = load(model).eval()(ids).logits
    assert (first - second).abs().max() < 1e-5 and (first - third).abs().max() < 1e-5
    assert (first - plain).abs().max() > 0.1
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for line, row in zip(
        (tmp_path / "scores.jsonl").read_text().splitlines(), data.read_text().splitlines(), strict=True
    ):
        row = json.loads(row)
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        prompt = [tokenizer.bos_token_id, *prompt] if family == "llama" else prompt
        response = [*tokenizer(row["chosen"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        expected = response_logprob(torch, adapted[0], prompt, response)
        assert json.loads(line)["logp_chosen"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("init", ["zero_a", "zero_b"])
@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_five_steps_are_those_of_trl(torch, tmp_path, init, name):
    """Same adapters, same pairs, float32: losses within 1e-4 and the change of the adapters within 1e-4 of its size."""
    model, data = made(torch, tmp_path, "llama")
    still = {"optimizer": {"learning_rate": 2e-37, "warmup_steps": 0}, "train": {"max_steps": 1}}
    assert train(config_of(tmp_path / "zero", model, data, lora={"init": init}, **still)) == 0
    export(tmp_path / "zero" / "run", tmp_path / "start")
    optimizer = {"name": name, "learning_rate": 1e-3, "warmup_steps": 0, "max_grad_norm": 1.0}
    config = config_of(tmp_path / "ours", model, data, tmp_path / "start", optimizer=optimizer, train={"epochs": 5})
    assert train(config) == 0
    export(tmp_path / "ours" / "run", tmp_path / "ended")
    losses, adapters = trl_run(torch, tmp_path, model, data, name)
    ours = metrics_of(config.output_dir)
    np.testing.assert_allclose([line["loss"] for line in ours], losses, atol=1e-4)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[-1] < losses[0] - 1e-3
    start, ended = (load_file(tmp_path / which / FILE) for which in ("start", "ended"))
    moved = {key: (ended[key] - start[key], adapters[key] - start[key]) for key in start}
    apart = np.sqrt(sum(np.square(one - other).sum() for one, other in moved.values()))
    size = np.sqrt(sum(np.square(other).sum() for _, other in moved.values()))
    print(
        f"{init}, {name}: losses apart by {np.abs(np.subtract([line['loss'] for line in ours], losses)).max():.1e}, "
        f"updates by {apart / size:.1e} of their size"
    )
    assert apart < 1e-4 * size


def trl_run(torch, root, model, data, name):
    """Losses of TRL's five steps from the same adapters, and the adapters after them, by the names of the file."""
    import datasets
    import peft
    import transformers
    from trl import DPOConfig, DPOTrainer

    losses = []

    class Recorded(DPOTrainer):
        def compute_loss(self, *arguments, **named):
            loss = super().compute_loss(*arguments, **named)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
            return loss

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy = peft.PeftModel.from_pretrained(base, root / "start", is_trainable=True)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    settings = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 5,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": {"adamw": "adamw_torch", "rmsprop": "rmsprop"}[name],
        "optim_args": None if name == "adamw" else "alpha=0.99",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": 0.1,
        "max_length": 96,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "disable_dropout": True,
    }
    trainer = Recorded(
        model=policy,
        args=DPOConfig(output_dir=str(root / "trl"), **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.model.save_pretrained(root / "theirs", selected_adapters=["default"])
    return losses, load_file(root / "theirs" / FILE)
