"""Write `golden.json` again, and say which rows changed: `python -m tests.golden.write`.

Only at a commit that means to change numbers, whose message says which mended fault or which change moved which rows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from .scenes import SCENES, Rows


GOLDEN = Path(__file__).with_name("golden.json")
# Another processor sums in another order. Flags, labels and texts have no tolerance.
FLOAT32 = {"rel_tol": 0.0, "abs_tol": 1e-4}
TOLERANCES = {
    "sanity": {"rel_tol": 1e-3, "abs_tol": 1e-4},  # its numbers have four digits
    # float64, from start noise whose bits are the same everywhere
    "losses": {"rel_tol": 1e-9, "abs_tol": 0.0},
}


def dumps(golden: dict[str, Rows]) -> str:
    """JSON with one line for each row, sorted, so that a diff can be read."""
    scenes = []
    for scene, rows in sorted(golden.items()):
        lines = [f"  {json.dumps(name)}: {json.dumps(row, sort_keys=True)}" for name, row in sorted(rows.items())]
        scenes.append(f" {json.dumps(scene)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(scenes) + "\n}\n"


def load() -> dict[str, Rows]:
    return json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}


def changed(scene: str, old: Rows, new: Rows) -> list[str]:
    """Names of the rows that are not the same within the scene's tolerance, or that one side lacks."""
    tolerance = TOLERANCES.get(scene, FLOAT32)
    return [name for name in sorted({*old, *new}) if not same(old.get(name), new.get(name), tolerance)]


def same(one: Any, other: Any, tolerance: dict[str, float]) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(*pair, tolerance) for pair in zip(one, other))
    return math.isclose(one, other, **tolerance) if isinstance(one, float) else one == other


def main() -> None:
    torch.set_num_threads(1)
    old, golden = load(), {}
    for scene, play in SCENES.items():
        golden[scene] = json.loads(json.dumps(play()))
        for name in changed(scene, old.get(scene, {}), golden[scene]):
            print(f"{scene}: {name}\n  {old.get(scene, {}).get(name)}\n  {golden[scene].get(name)}")
    GOLDEN.write_text(dumps(golden), encoding="utf-8")


if __name__ == "__main__":
    main()
