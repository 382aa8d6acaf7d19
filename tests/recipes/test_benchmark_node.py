"""What a node needs: operations by a closed form, and a table whose numbers follow from its parts."""

from __future__ import annotations

import io

import pytest
from benchmark_node import EPOCH, GPUS, PEAK, PHOTO, SHARE, TOWERS, node_table, operations, passes, photos
from PIL import Image


@pytest.mark.parametrize("name", TOWERS)
def test_operations_of_a_forward_pass(name):
    """Of each matrix product of m x k by k x n, 2 m k n."""
    tower = TOWERS[name]
    width, mlp, layers = (tower[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    tokens = patches + 1
    a_layer = 2 * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp)
    wanted = layers * a_layer + 2 * patches * 3 * tower["patch_size"] ** 2 * width
    assert operations(tower) == pytest.approx(wanted, rel=1e-3)


def test_the_table_follows_from_its_parts(monkeypatch):
    monkeypatch.setattr("benchmark_node.core", lambda size, rounds: (100.0, [1e-2, 1e-3, 1e-3]))
    lines = node_table(1)
    row = next(line for line in lines if line.startswith("| ViT-L/14, 336 px | 10"))
    cells = [cell.strip().replace(",", "") for cell in row.strip("|").split("|")][1:]
    takes = GPUS * PEAK * SHARE / (24 * operations(TOWERS["ViT-L/14, 336 px"]))
    assert [int(cells[0]), int(cells[1])] == [10, passes(10)] == [10, 24]
    assert [float(cell) for cell in cells[3:]] == [round(takes), round(EPOCH / takes / 60, 1), round(takes * 0.012)]
    assert "| 224 px | 100 | 100 | 1,000 | 1,000 |" in lines


def test_the_photos_are_files_of_the_stated_size():
    data = photos(32)
    assert data[0]["images"].shape == (3, 32, 32)
    assert Image.open(io.BytesIO(data.rows[0]["image"]["bytes"])).size == PHOTO
