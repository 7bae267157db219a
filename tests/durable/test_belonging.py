"""What a step holds against its name and the run around it."""

import json

import pytest

from sr_dpo_jax.durable.belonging import run_id_of, stored_position, stranger
from sr_dpo_jax.durable.files import json_digest

IDS = (("abc", "abc"), ("abb", None))
"""A run's id as it was, and with a flipped bit; and what is believed."""


def step(root, name, **position):
    (root / name / "position").mkdir(parents=True)
    (root / name / "position" / "metadata").write_text(json.dumps(position), encoding="utf-8")
    return root / name


def test_the_id_of_a_run_stands_in_its_manifest(tmp_path):
    assert run_id_of(tmp_path) is None
    contents = {'{"run_id": "abc"}': "abc", '{"run_id": 7}': None, "[]": None, "{": None, "\xff": None}
    contents |= {json.dumps({"run_id": run_id, "run_id_digest": json_digest("abc")}): found for run_id, found in IDS}
    for content, found in contents.items():
        (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
        assert run_id_of(tmp_path) == found


def test_a_position_that_cannot_be_read_is_empty(tmp_path):
    assert stored_position(tmp_path / "4") == {}
    assert stored_position(step(tmp_path, "4", next_step=4)) == {"next_step": 4}
    (tmp_path / "4" / "position" / "metadata").write_bytes(b"\xff{")
    assert stored_position(tmp_path / "4") == {}


@pytest.mark.parametrize(
    ("position", "run_id", "said"),
    [
        ({"next_step": 4, "run_id": "a"}, "a", None),
        ({"next_step": 4}, "a", None),  # of an earlier version
        ({"next_step": 4, "run_id": "a"}, None, None),
        ({}, "a", "cannot be read"),
        ({"next_step": 2, "run_id": "a"}, "a", "it holds step 2"),
        ({"next_step": 4, "run_id": "b"}, "a", "another run (b, this is a)"),
    ],
)
def test_a_stranger_is_told_by_what_it_holds(tmp_path, position, run_id, said):
    found = stranger(step(tmp_path, "4", **position), run_id)
    assert found is None if said is None else said in found
