"""The README and the pages beside the code: what they name exists, what they show runs, what they promise is short."""

import ast
import re
import shutil
import subprocess
import sys
from argparse import _SubParsersAction
from pathlib import Path

import pytest
import yaml
from runs import REPOSITORY, metrics_of, model_directory, preference_file, raw_config, written

import sr_dpo_jax
from sr_dpo_jax.cli import parser
from sr_dpo_jax.config.load import config_from_dict

PACKAGE = REPOSITORY / "sr_dpo_jax"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    [REPOSITORY / "README.md", REPOSITORY / "tpu_scripts" / "README.md", *PACKAGE.rglob("README.md")],
    key=lambda page: page.as_posix(),
)
PAGES_BESIDE_THE_CODE = ("data", "weights", "durable", "train", "commands", "model", "commands/demo")
OF_A_RUN = re.compile(
    # No .py: those are ours.
    r"(lease|run|config|ours|manifest|eval|tune|results|report|tokenizer)\.(json|yaml|html|md)"
)
"""Names of files that a user has or a run writes, and not the repository."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def road() -> tuple[list[str], dict[str, set[str]]]:
    """The files of the README's reading order, and for each the side rooms that its line names."""
    section = README.partition("## Reading the code")[2]
    lines = re.findall(r"^\d+\. (.*)$", section, flags=re.MULTILINE)
    named = [re.findall(r"`([\w/]+\.py)`", line) for line in lines]
    return [names[0] for names in named], {names[0]: set(names[1:]) for names in named}


def imports(file: str) -> set[str]:
    """The files of the package that a file imports, by paths relative to the package."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sr_dpo_jax"):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {Path(*name.split(".")[1:]).with_suffix(".py").as_posix() for name in found if "." in name}
    return {path for path in paths if (PACKAGE / path).is_file()}


def next_file(file: str) -> str | None:
    """The file that the docstring's last paragraph names as the next one, if it does."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))) or ""
    match = re.fullmatch(r"Next: `([\w/.]+)`, which [^\n]+\.", docstring.rpartition("\n\n")[2].replace("\n", " "))
    return match and match[1]


def test_the_front_door_is_short():
    assert README.count("\n") <= 110
    assert [block.splitlines()[-1] for block in blocks(README, "bash")[:2]] == [
        ".venv/bin/sr-dpo demo",
        ".venv/bin/pytest -q",
    ]


def test_the_docstrings_give_the_reading_order_of_the_readme():
    files, _ = road()
    assert len(files) <= 10 and files[0] == "config/schema.py" and files[-1] == "losses.py"
    assert [next_file(file) for file in files] == [*files[1:], None]
    others = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - set(files)
    assert not {file for file in others if next_file(file) in files}, "a second road leads into the reading order"


def test_imports_give_the_reading_order_too():
    """Each file imports an earlier one or is imported by one, directly or through a side room that the list names."""
    files, side_rooms = road()
    neighbours: dict[str, set[str]] = {}
    for file in {*files, *set().union(*side_rooms.values())}:
        for imported in imports(file):
            neighbours.setdefault(file, set()).add(imported)
            neighbours.setdefault(imported, set()).add(file)
    for position, file in enumerate(files[1:], 1):
        earlier = set(files[:position])
        rooms = set().union(*(side_rooms[name] for name in earlier))
        near = neighbours[file] | set().union(*(neighbours[room] for room in rooms & neighbours[file]))
        assert near & earlier, f"{file}: no import joins it to {', '.join(files[:position])}"


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((\S+?README\.md)\)", README))
    assert {f"sr_dpo_jax/{name}/README.md" for name in PAGES_BESIDE_THE_CODE} | {"tpu_scripts/README.md"} <= linked
    assert {page.relative_to(REPOSITORY).as_posix() for page in PAGES} - {"README.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target.partition("#")[0]).exists()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    named = [word for word in re.findall(r"`(?:python )?([\w./-]+)[^`\n]*`", prose) if looks_like_a_path(word)]
    roots = (page.parent, PACKAGE, REPOSITORY)
    assert not [word for word in named if not any((root / word).exists() for root in roots)]


def looks_like_a_path(word: str) -> bool:
    """Whether a word in backticks is meant as a file or directory of the repository."""
    if OF_A_RUN.fullmatch(word.rpartition("/")[2]):
        return False
    known = re.fullmatch(r"[\w./-]+\.(py|sh|md|svg|html|css|json|yaml|toml)", word)
    return bool(known) or word.startswith(("tests/", "sr_dpo_jax/", "configs/", "tpu_scripts/", ".ci/"))


def test_the_table_of_commands_is_that_of_the_parser():
    rows = re.findall(r"^\| `sr-dpo ([\w-]+)", README, flags=re.MULTILINE)
    (action,) = (action for action in parser()._actions if isinstance(action, _SubParsersAction))
    assert len(rows) == len(set(rows)) and set(rows) == set(action.choices)
    for page in PAGES:
        named = re.findall(r"sr-dpo ([a-z][a-z-]*)", page.read_text(encoding="utf-8"))
        assert set(named) <= {*action.choices, "writes"}, page


def test_the_yaml_is_a_whole_configuration():
    (block,) = blocks(README, "yaml")
    config = config_from_dict(yaml.safe_load(block), where="run.yaml")
    assert config.objective.name == "sr_dpo"
    assert "sr-dpo train run.yaml" in blocks(README, "bash")[2]


def test_the_python_block_names_what_there_is():
    (block,) = blocks(README, "python")
    tree = ast.parse(block)
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 10
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sr_dpo_jax"
    }
    assert used == set(sr_dpo_jax.__all__)
    (loss,) = (
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("sr_dpo_jax.losses.")
    )
    lines = [node for node in tree.body if isinstance(node, ast.Import)]
    exec(compile(ast.Module([*lines, loss], []), "README.md", "exec"), values := {})  # noqa: S102 (our own page)
    assert values["losses"].shape == (2,)


def copy_with_savage(root: Path) -> Path:
    """Copies the package and edits the copy as the three numbered paragraphs of the page say."""
    package = root / "copy" / "sr_dpo_jax"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    page = (PACKAGE / "train" / "README.md").read_text(encoding="utf-8").partition("## How to add a loss")[2]
    function, name, row = blocks(page, "python")
    assert "1. Append the function to `losses.py`." in page
    assert "2. In `config/objectives.py`, add its name to the class that has its keys" in page
    assert "3. Add this row to the table `PLAIN` in `train/objective.py`" in page

    losses = package / "losses.py"
    losses.write_text(losses.read_text(encoding="utf-8") + "\n\n" + function, encoding="utf-8")

    file = package / "config" / "objectives.py"
    text, before = file.read_text(encoding="utf-8"), name.replace(', "savage"', "")
    assert before != name and text.count(before) == 1, "the page's names of the class are behind the code"
    file.write_text(text.replace(before, name), encoding="utf-8")

    file = package / "train" / "objective.py"
    text = file.read_text(encoding="utf-8")
    assert text.count("\nPLAIN = {\n") == 1
    file.write_text(text.replace("\nPLAIN = {\n", f"\nPLAIN = {{\n    {row}"), encoding="utf-8")
    return package


def test_the_edits_of_how_to_add_a_loss_fit_the_code(tmp_path):
    copy = copy_with_savage(tmp_path)
    for file in ("losses.py", "config/objectives.py", "train/objective.py"):
        code = (copy / file).read_text(encoding="utf-8")
        assert code != (PACKAGE / file).read_text(encoding="utf-8")
        compile(code, file, "exec")


@pytest.mark.slow  # half a minute: a process that compiles and trains
def test_how_to_add_a_loss(tmp_path):
    copy = copy_with_savage(tmp_path)
    model, data = model_directory(tmp_path / "model"), preference_file(tmp_path / "pairs.jsonl", 16)
    raw = raw_config(tmp_path, model, data, train={"max_steps": 2}, refinement={"prompt": None})
    raw["objective"] = {"name": "savage", "beta": 0.1, "lam": None}
    environment = {
        "PYTHONPATH": str(copy.parent),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-m", "sr_dpo_jax.cli", "train", written(tmp_path, raw)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = metrics_of(raw["output_dir"])
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == 0.25 and 0 < lines[1]["loss"] < 0.26 and lines[0]["grad_norm"] > 0
    # The tests of the table take the new row, and that of its twin, as they are.
    test = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    test += [str(REPOSITORY / "tests" / "train" / "test_objective.py"), "-k", "savage or table"]
    done = subprocess.run(test, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and int(re.search(r"(\d+) passed", done.stdout)[1]) > 10, done.stdout
