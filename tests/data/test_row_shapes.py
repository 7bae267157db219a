"""The shapes of rows that users have, one small file each: what happens with every one of them."""

from pathlib import Path

import pytest

from sr_dpo_jax.data.records import files_of
from sr_dpo_jax.data.rows import BadRow, read_rows

ROWS = Path(__file__).resolve().parents[3] / "shared" / "data" / "rows"
pytestmark = pytest.mark.skipif(not ROWS.exists(), reason=f"REAL DATA IS ABSENT: {ROWS}")

TAKEN = {
    "chat_varied_systems.jsonl": "preference",
    "chatkwargs.jsonl": "preference",
    "dir": "hh_rlhf",
    "dir2": "preference",
    "dir3": "hh_rlhf",
    "disk": "preference",
    "diskdict": "preference",
    "emptysys.jsonl": "preference",
    "hh.csv": "hh_rlhf",
    "hh.json": "hh_rlhf",
    "hh.jsonl.bz2": "hh_rlhf",
    "hh.jsonl.zst": "hh_rlhf",
    "implicit_msgs.jsonl": "preference",
    "implicit_text.jsonl": "preference",
    "list.json": "hh_rlhf",
    "margin.jsonl": "preference",
    "name.jsonl": "preference",
    "nosys.jsonl": "preference",
    "parts.jsonl": "preference",
    "prompt_str_full.jsonl": "preference",
    "prompt_str_msgs.jsonl": "preference",
    "scores.jsonl": "preference",
    "sft_messages.jsonl": "sft",
    "sft_prompt_completion.jsonl": "sft",
    "sys1.jsonl": "preference",
    "text.jsonl": "preference",
    "tool_calls.jsonl": "preference",
    "tool_plain.jsonl": "preference",
    "tools_col.jsonl": "preference",
    "ultrafeedback.jsonl": "ultrafeedback",
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_shape_is_read(name):
    for file in files_of(str(ROWS / name), split="train"):
        rows = list(read_rows(file, format=TAKEN[name], split="train"))
        bad = [(row.file, row.line) for row in rows if isinstance(row, BadRow)]
        assert rows and bad == ([(str(ROWS / "dir3" / "b.jsonl"), 5)] if file.endswith("dir3/b.jsonl") else [])


def test_every_shape_is_in_the_table():
    assert {path.name for path in ROWS.iterdir()} == set(TAKEN)
