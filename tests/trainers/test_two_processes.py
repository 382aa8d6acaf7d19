"""Two gloo processes against one, in float64 with SGD."""

from __future__ import annotations

import json
import sys

import pytest

from tests.trainers.helpers import SGD, largest_gap
from tests.trainers.test_resume import final, start


EXACT = SGD | {"double": True, "max_steps": 3, "measure": True}
TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29731")


def flags(output):
    names = json.loads((output / "samples.json").read_text())
    return [[json.loads(line) for line in (output / name).read_text().splitlines()] for name in names]


@pytest.mark.parametrize(
    "settings",
    [
        {"form": "anchored", "feature": "both"},
        {
            "form": "frozen",
            "feature": "patch_tokens",
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
        },
        {"use_peft": True, "layer_decay": 0.5, "torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["anchored", "frozen-accumulated", "lora-compiled"],
)
def test_two_processes_equal_one(settings, clip_folder, tmp_path):
    one = start(clip_folder, tmp_path / "one", per_device_train_batch_size=4, **EXACT, **settings)
    assert one.returncode == 0, one.stderr
    two = start(
        clip_folder, tmp_path / "two", launcher=TWO, per_device_train_batch_size=2, world_size=2, **EXACT, **settings
    )
    # Gloo may abort at exit after all work is done, so the files decide; the run asserts its world size itself.
    assert (tmp_path / "two" / "samples.json").is_file(), two.stderr
    first, second = final(tmp_path / "two", 0), final(tmp_path / "two", 1)
    assert largest_gap(first, second) == 0
    assert largest_gap(first, final(tmp_path / "one")) < 1e-10
    parts = [
        [[(row["id"], row["clean"], row["fooled_by"]) for row in rows] for rows in flags(tmp_path / name)]
        for name in ("one", "two")
    ]
    assert parts[0] == parts[1]
    assert not list((tmp_path / "two").glob("*.rank*"))
