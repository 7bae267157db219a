"""`sr-dpo inspect`: its counts against files and against arrays on a mesh, its problems, its print."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy_tokenizers as toy
from runs import model_directory, run_process
from safetensors.numpy import load_file, save_file

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.inspect.inspect import inspect_model, parse_mesh
from sr_dpo_jax.commands.inspect.show import _flat, print_inspection
from sr_dpo_jax.config.schema import PAPER_INSTRUCTION
from sr_dpo_jax.data.tokens import load_tokenizer
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.optim import OPTIMIZERS
from sr_dpo_jax.weights import directory as weights
from sr_dpo_jax.weights.placement import reference_copy

pytestmark = pytest.mark.usefixtures("same_programs")

FIELDS = {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A directory with weights in several files, half of them in bfloat16."""
    path = model_directory(tmp_path_factory.mktemp("model"), "llama", **FIELDS)
    directory = weights.open_directory(str(path))
    model = tiny.build(directory.architecture, tiny.make_mesh())
    tiny.save_weights(model.params(), directory, model.abstract, path, shard_bytes=30_000)
    first = sorted(path.glob("*.safetensors"))[0]
    save_file({name: tensor.astype(jnp.bfloat16) for name, tensor in load_file(first).items()}, first)
    return path


def inspect(path, mesh="fsdp=8", prompt=PAPER_INSTRUCTION, digest=False):
    return inspect_model(str(path), revision=None, mesh=parse_mesh(mesh), prompt=prompt, digest=digest)


def copied(path, tmp_path):
    return shutil.copytree(path, tmp_path / "model")


def test_parameters_by_part(llama):
    found = inspect(llama)
    vocabulary, hidden, layers, heads, kv_heads, head_dim, mlp = 320, 32, 2, 4, 2, 24, 64
    projections = (2 * heads + 2 * kv_heads) * head_dim * hidden
    biases = (heads + 2 * kv_heads) * head_dim + hidden
    assert found.parameters == {
        "embedding": vocabulary * hidden,
        "attention": layers * (projections + biases),
        "mlp": layers * 3 * hidden * mlp,
        "norms": (2 * layers + 1) * hidden,
        "unembedding": 0,
    }
    assert found.problems == () and found.family == "llama"
    assert found.architecture["kv_heads"] == kv_heads and found.architecture["tied"] is True


def test_tensors_are_those_of_the_files(llama):
    found = inspect(llama)
    files = sorted(llama.glob("*.safetensors"))
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert found.weights.files == len(files) > 2
    for name, dtype in (("F32", np.float32), ("BF16", jnp.bfloat16)):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        assert found.weights.tensors[name] == len(alike) > 0
        assert found.weights.tensor_bytes[name] == sum(tensor.nbytes for tensor in alike)
    assert sum(found.parameters.values()) == sum(tensor.size for tensor in tensors)


def on_first_device(tree) -> int:
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_what_lies_on_a_device(llama, shape, dtype):
    sizes = dict(zip(("replica", "fsdp", "tensor"), shape, strict=True))
    memory = inspect(llama, ",".join(f"{name}={size}" for name, size in sizes.items())).memory[dtype]
    model = tiny.build(weights.open_directory(str(llama)).architecture, tiny.make_mesh(**sizes), dtype=dtype)
    for name in ("rmsprop", "adamw"):
        numbers = {} if name == "rmsprop" else {"weight_decay": 0.0, "b1": 0.9, "b2": 0.99, "first_moment_dtype": None}
        optimizer = OPTIMIZERS[name](lambda step: 1e-3, max_grad_norm=1.0, **numbers)
        state = model.state(optimizer)
        assert memory.parameters_bytes == on_first_device(state.params)
        assert memory.moments_bytes[name] == on_first_device(state.optimizer_state)
    assert memory.online_reference_bytes == on_first_device(reference_copy(state.params, jnp.dtype("bfloat16")))
    norms = 5 * 32 // sizes["fsdp"]  # they stay in their own type
    wide = memory.parameters_bytes // jnp.dtype(dtype).itemsize - norms
    assert memory.online_reference_bytes == 2 * wide + jnp.dtype(dtype).itemsize * norms
    assert memory.gradients_bytes == memory.parameters_bytes * (2 if dtype == "bfloat16" else 1)
    parts = memory.parameters_bytes + memory.gradients_bytes + memory.moments_bytes["adamw"]
    assert memory.total_bytes("adamw", online=False) == parts
    assert memory.total_bytes("adamw", online=True) == parts + memory.online_reference_bytes


def test_axes_that_do_not_divide_are_named(llama, capsys):
    assert main(["inspect", str(llama), "--mesh", "fsdp=3"]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "['layers']['attention']['query']: axis 'embed' of size 32 does not divide over fsdp = 3 shards" in printed
    assert "['embedding']: axis 'table' of size 32" in printed
    assert "Memory" not in printed and "Parameters" in printed


def test_weights_that_do_not_fit(llama, tmp_path, capsys):
    path = copied(llama, tmp_path)
    file = sorted(path.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    assert main(["inspect", str(path)]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{name}: missing" in printed and "see the problems below" in printed


def test_without_weights(tmp_path, capsys):
    assert main(["inspect", str(model_directory(tmp_path / "model"))]) == 0
    printed = capsys.readouterr().out
    assert "none in safetensors: a run needs model.init=random" in printed and "fsdp 8" in printed


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.gguf"])
def test_weights_that_no_run_would_read(tmp_path, capsys, name):
    path = model_directory(tmp_path / "model")
    (path / name).write_bytes(b"\x80\x04")
    assert main(["inspect", str(path)]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{name} is not read: only safetensors weights are read (no .bin" in printed
    assert "save_pretrained" in printed and "model.init=random" in printed and "Memory a chip" in printed
    (path / name).rename(path / "training_args.bin")
    assert main(["inspect", str(path)]) == 0, "which holds no weights"


def test_files_without_their_index(llama, tmp_path, capsys):
    path = copied(llama, tmp_path)
    (path / "model.safetensors.index.json").unlink()
    assert main(["inspect", str(path)]) == 2
    assert "other files of the weights stand beside it" in " ".join(capsys.readouterr().out.split())


def test_a_blank_name(capsys):
    assert main(["inspect", ""]) == 2
    assert "model.path='': is blank" in capsys.readouterr().err


def test_without_a_fitting_tokenizer(tmp_path, capsys):
    path = model_directory(tmp_path / "model", eos_token_id=9)
    assert main(["inspect", str(path)]) == 2
    assert "the tokenizer does not fit the model: its EOS token" in " ".join(capsys.readouterr().out.split())
    (path / "tokenizer.json").unlink()
    assert main(["inspect", str(path)]) == 2
    printed = capsys.readouterr().out
    assert "has no tokenizer.json" in " ".join(printed.split()) and "Memory a chip" in printed


def test_digest(llama):
    assert inspect(llama).digest is None
    assert inspect(llama, digest=True).digest == weights.weights_digest(weights.open_directory(str(llama)))


@pytest.mark.parametrize("name", ["qwen25", "gemma2", "mistral"])
def test_where_p_can_stand(tmp_path, name):
    path = model_directory(tmp_path / "model", vocabulary_tokens=512, eos_token_id=None, bos_token_id=None)
    toy.chat_tokenizer(path, name)
    tokenizer = load_tokenizer(str(path))
    found = inspect(path, prompt="Be good.")
    system = found.placements["chat with a system message"]
    assert (system.reason is None) is (name == "qwen25")
    assert all(found.placements[form].reason is None for form in ("text", "chat", "chat of several turns"))
    chat = found.placements["chat"]
    # Spelled from ids: SentencePiece shows a space after a special token.
    spelled = [text.replace("<s> ", "<s>") for text in (chat.head, chat.rest, chat.response)]
    written = [{"role": "user", "content": "Be good.Hello"}, {"role": "assistant", "content": "Hi"}]
    whole = tokenizer.apply_chat_template(written, tokenize=False).rstrip().removesuffix(tokenizer.eos_token)
    assert spelled[0] + "Be good." + spelled[1] + spelled[2] == whole + tokenizer.eos_token
    assert tokenizer.decode(tokenizer(spelled[0], add_special_tokens=False)["input_ids"]) == chat.head
    assert chat.head_tokens == len(tokenizer(spelled[0], add_special_tokens=False)["input_ids"])
    mid_text = tokenizer(spelled[0] + "Be good.", add_special_tokens=False)["input_ids"]
    assert chat.augmentation_tokens == len(mid_text) - chat.head_tokens


def test_p_that_the_template_trims(tmp_path, capsys):
    path = model_directory(tmp_path / "model", vocabulary_tokens=512, eos_token_id=None)
    toy.chat_tokenizer(path, "gemma2")
    found = inspect(path, prompt=" Be good.")
    assert "cannot place refinement.prompt verbatim" in found.placements["chat"].reason
    assert found.placements["text"].reason is None
    assert found.problems == ()  # a run on plain text goes well
    assert main(["inspect", str(path), "--prompt", " "]) == 2
    assert "blank" in capsys.readouterr().err


def test_the_print_is_plain_and_narrow(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    path = model_directory(tmp_path / "a long [red]name[/red] of a directory" / ("x" * 120), vocabulary_tokens=512)
    toy.chat_tokenizer(path, "mistral")
    found = inspect(path)
    print_inspection(found)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert max(len(line) for line in printed.splitlines()) <= 100
    assert "[INST]" in printed and "[red]name[/red]" in "".join(printed.split("\n"))
    for name in dataclasses.asdict(weights.open_directory(str(path)).architecture):
        assert name in printed


def test_json_holds_everything(llama, tmp_path):
    file = tmp_path / "found.json"
    assert main(["inspect", str(llama), "--json", str(file), "--mesh", "fsdp=4,tensor=2"]) == 0
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(dataclasses.asdict(inspect(llama, "fsdp=4,tensor=2"))))
    assert written["mesh"] == {"replica": 1, "fsdp": 4, "tensor": 2}
    assert written["memory"]["float32"]["parameters_bytes"] > 0
    assert main(["inspect", str(llama), "--json", str(tmp_path / "none" / "found.json")]) == 2


def test_fields_of_any_shape_are_told():
    fields = {
        "caps": None,
        "kinds": ({"window": 4096, "rope": {"frequencies": tuple(2.0**-n for n in range(32))}}, {"window": None}),
        "kind_of_layer": (0, 1) * 13,
        "few": (1, 2),
    }
    assert dict(_flat(fields)) == {
        "caps": "none",
        "kinds[0].window": "4,096",
        "kinds[0].rope.frequencies": "32 values from 1 to 4.65661e-10",
        "kinds[1].window": "none",
        "kind_of_layer": "0 (13 times), 1 (13 times)",
        "few": "1, 2",
    }


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=0", "fsdp=-1", "fsdp=8,fsdp=2", "data=8", "fsdp=8,"])
def test_meshes_that_are_refused(text):
    with pytest.raises(UsageError, match="--mesh"):
        parse_mesh(text)


@pytest.mark.slow
def test_no_accelerator_is_touched(llama):
    """The platform of the process is not there, so starting a backend of its own choice would fail."""
    process = run_process(["inspect", str(llama)], JAX_PLATFORMS="none")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "Left for activations" in printed
