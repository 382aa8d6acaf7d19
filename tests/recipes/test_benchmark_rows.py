"""The rehearsal of a million rows, with a few thousand: in one process and in two, in memory and as a stream."""

from __future__ import annotations

import math
import shutil
import sys

import benchmark_rows
import pytest

from tests.launcher import ROOT, TWO, launch, outcome


SCRIPT = ROOT / "recipes" / "research" / "benchmark_rows.py"
STAGES = ["imports", "the model", "splits, ids, labels and class names", "the trainer", "up to update 2"]


def test_the_table_holds_the_most_of_all_processes():
    one = [("imports", [math.nan, math.nan, 0.5, 0.7]), ("the model", [1.0, 0.25, 0.5, 0.75])]
    two = [("imports", [math.nan, math.nan, 0.4, 0.8]), ("the model", [0.5, 0.75, 0.6, 0.7])]
    lines = benchmark_rows.table(3000, [one, two]).splitlines()
    assert lines[0].startswith("| 3,000 rows, 2 processes |")
    assert lines[2:] == ["| imports |  |  | 0.50 | 0.80 |", "| the model | 1.0 | 0.8 | 0.60 | 0.75 |"]


def test_training_rows_lie_in_shards_for_two_processes(tmp_path):
    benchmark_rows.write_rows(tmp_path, "train", 10, 4)
    tables = [benchmark_rows.pq.read_table(file) for file in sorted(tmp_path.glob("train-*.parquet"))]
    assert [len(table) for table in tables] == [3, 3, 3, 1]
    labels = [label for table in tables for label in table["label"].to_pylist()]
    assert labels == list(range(10))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["rows", "stream"])
@pytest.mark.parametrize("launcher", [(), TWO], ids=["one", "two"])
def test_a_run_of_a_few_thousand_rows(launcher, streaming, tmp_path):
    """Up to the second update, and again from the checkpoint of the first."""
    words = [SCRIPT, "--rows", 3000, "--output_dir", tmp_path, "--batch_size", 4, "--max_steps", 2, "--save_steps", 1]
    for more in ([], ["--resume_from_checkpoint"]):
        shutil.rmtree(tmp_path / "run" / "checkpoint-2", ignore_errors=True)
        status, said, wrong = outcome(launch(*launcher, *words, *streaming, *more))
        assert status == 0, wrong
        lines = [line for line in said.splitlines() if line.startswith("|")]
        assert lines[0].startswith(f"| 3,000 rows, {2 if launcher else 1} processes |")
        assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == STAGES
        assert (tmp_path / "run" / "checkpoint-2").is_dir()
