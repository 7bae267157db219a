"""The house rules, read from the source: who imports what, what is never called, how long things may be."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from sr_dpo_jax.train.objective import OBJECTIVES

PACKAGE = Path(__file__).resolve().parents[1] / "sr_dpo_jax"
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"), filename=file)


def module_of(file: str) -> str:
    parts = ["sr_dpo_jax", *Path(file).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST) -> set[str]:
    """Every module that is imported anywhere in the file, in functions too; `from a import b` is a and a.b.

    What a type checker alone imports is left out.
    """
    found = set()
    for node in running(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING"):
            yield node
            yield from running(node)


def importers_of(library: str) -> set[str]:
    return {file for file in FILES if library in {name.split(".")[0] for name in imports_of(tree_of(file))}}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_there_is_something_to_read():
    assert {"config/schema.py", "train/train_step.py", "data/plan.py", "model/decoder.py"} <= set(FILES)
    assert importers_of("jax") > {"losses.py", "train/train_step.py"}


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("orbax", {"durable/checkpoint.py"}),
        ("optax", {"train/optim.py", "train/train_step.py", "train/state.py"}),
        ("grain", {"data/pipeline.py"}),
        ("openai", {"commands/judge/endpoint.py"}),
        ("wandb", {"train/wandb_run.py"}),
        ("lm_eval", {"commands/lm_eval/mesh_lm.py", "commands/lm_eval/command.py"}),
        ("tokamax", {"model/kernels/triton.py"}),
        ("absl", {"model/kernels/triton.py"}),
        (
            "matplotlib",
            {
                "commands/report/figures.py",
                "commands/report/page.py",
                "commands/report/pair_figures.py",
                "commands/demo/figures.py",
            },
        ),
        (
            "scipy",
            {
                "commands/correlation.py",
                "train/knowledge.py",
                "commands/judge/outcomes.py",
                "commands/report/tables.py",
                "commands/demo/statistics.py",
            },
        ),
        ("torch", set()),
        ("trl", set()),
        ("pickle", set()),
        ("dill", set()),
        ("cloudpickle", set()),
        ("joblib", set()),
        ("marshal", set()),
        ("shelve", set()),
    ],
)
def test_libraries_stay_in_their_files(library, allowed):
    assert importers_of(library) <= allowed


def test_datasets_stays_in_data():
    assert {file for file in importers_of("datasets") if not file.startswith("data/")} == set()


def test_described_devices_stay_in_aot():
    """Everything else runs on devices that are there."""
    found = {file for file in FILES if "jax.experimental.topologies" in imports_of(tree_of(file))}
    assert found == {"commands/compile/machine.py"}


@pytest.mark.parametrize(
    "first", ["config/load.py", "commands/tune.py", "commands/report/page.py", "commands/demo/page.py"]
)
def test_no_device_is_touched(first):
    """What reads the configuration, starts runs or compares them imports no jax, nor does anything that it imports.

    So does the command line until it runs.
    """
    seen, queue = set(), [first]
    while queue:
        file = queue.pop()
        seen.add(file)
        names = imports_of(tree_of(file))
        assert not {"jax", "flax", "optax"} & {name.split(".")[0] for name in names}, file
        queue += [other for other in FILES if module_of(other) in names and other not in seen]
    top_level = ast.Module([node for node in tree_of("cli.py").body if not isinstance(node, ast.FunctionDef)], [])
    assert not {"jax", "flax"} & {name.split(".")[0] for name in imports_of(top_level)}


@pytest.mark.parametrize("file", FILES)
def test_nothing_runs_what_it_reads(file):
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert getattr(node.value, "value", None) is False, f"line {node.value.lineno}"  # named only to refuse it
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), f"line {node.lineno}"
            assert name not in ("yaml.unsafe_load", "yaml.full_load", "yaml.load_all"), f"line {node.lineno}"
            if name == "yaml.load":
                (loader,) = [keyword.value for keyword in node.keywords if keyword.arg == "Loader"]
                assert dotted(loader) in safe_loaders(file), f"line {node.lineno}"
            shell = [keyword.value for keyword in node.keywords if keyword.arg == "shell"]
            assert not any(getattr(value, "value", True) for value in shell), f"line {node.lineno}"


def safe_loaders(file: str) -> set[str]:
    classes = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.ClassDef)]
    ours = {node.name for node in classes if [dotted(base) for base in node.bases] == ["yaml.SafeLoader"]}
    return ours | {"yaml.SafeLoader", "yaml.CSafeLoader"}


def test_one_place_jits():
    """`jax.jit` as a call, a decorator or a name passed on, and its relatives: every program has the mesh installed."""
    uses = []
    for file in FILES:
        uses += [(file, node.lineno) for node in ast.walk(tree_of(file)) if dotted(node) in ("jax.jit", "nnx.jit")]
        assert not {"jax.jit", "jax.pmap", "flax.nnx.jit"} & imports_of(tree_of(file)), file
        assert not [node for node in ast.walk(tree_of(file)) if dotted(node) in ("jax.pmap", "nnx.pmap")], file
    assert [file for file, _ in uses] == ["parallel/mesh.py"], uses


@pytest.mark.parametrize("file", FILES)
def test_sizes(file):
    source = (PACKAGE / file).read_text(encoding="utf-8")
    assert source.count("\n") <= 400
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 < 60, f"{node.name} in line {node.lineno}"


@pytest.mark.parametrize("file", FILES)
def test_every_module_says_what_it_is(file):
    assert ast.get_docstring(tree_of(file))


SEES: dict[str, set[str]] = {
    "errors": set(),
    "redaction": set(),
    "formulas": set(),
    "losses": {"formulas"},
    "batch": set(),
    "config": {"errors", "redaction"},
    "parallel": {"errors", "redaction"},
    "durable": {"errors", "parallel"},
    "model": {"batch", "errors", "parallel"},
    "data": {"batch", "durable", "errors", "model", "parallel"},
    "weights": {"durable", "errors", "model", "parallel"},
    "generation": {"errors", "model", "parallel", "weights"},
}
"""The rooms that each room may import from. Above them stand train, which sees all of these, and commands, which see
train too."""
SEES["train"] = {*SEES}
SEES["commands"] = {*SEES}
SEES["cli"] = {*SEES}


def room_of(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_no_import_runs_upward(file):
    seen = {name.split(".")[1] for name in imports_of(tree_of(file)) if name.startswith("sr_dpo_jax.")}
    rooms = {room_of(other) for other in FILES}
    assert seen & rooms - {room_of(file), "__init__"} <= SEES[room_of(file)]


def test_the_configuration_ends_where_a_run_is_set_up():
    """Below, the core takes arrays and keyword numbers."""
    holders = {
        file for file in FILES if any(name.startswith("sr_dpo_jax.config") for name in imports_of(tree_of(file)))
    }
    core = {file for file in holders if room_of(file) not in ("config", "commands", "cli", "__init__")}
    assert core == {"train/setup.py", "train/prepare.py", "train/loop.py"}


def test_nobody_asks_for_the_name_of_an_objective():
    """What an objective is stands in `train/objective.py`: no comparison with a name, no set of names elsewhere."""
    names = {*OBJECTIVES}
    askers = {
        f"{file}:{node.lineno}"
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Compare)
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant) and constant.value in names
    }
    assert not askers


def test_no_import_cycle():
    """Imports inside functions count too: a cycle that is only put off is still a cycle."""
    modules = {module_of(file): file for file in FILES}
    graph = {name: imports_of(tree_of(file)) & modules.keys() - {name} for name, file in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("room", ["train", "durable"])
def test_every_module_has_a_test_file_of_its_name(room):
    modules = {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"}
    tests = {path.stem.removeprefix("test_") for path in (PACKAGE.parent / "tests" / room).glob("test_*.py")}
    assert modules <= tests, sorted(modules - tests)
