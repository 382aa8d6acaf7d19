"""How long from `pip install` to the first measured number of one's own photos, and how many commands it takes.

    python recipes/research/stopwatch.py

A virtual environment that sees the packages of this one (all dependencies are there, torch among them), a folder
`<class>/<image>` without splits, and a CLIP in a folder whose tokenizer knows the names: made here of the demo's pictures and
the demo's CLIP.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections import defaultdict
from pathlib import Path

from hf_robust_vision.data.demo import CLASS_NAMES, demo_checkpoint, demo_rows


ROOT = Path(__file__).parents[2]
CLASSES, PER_CLASS = CLASS_NAMES[:8], 10  # of which the split "test" gets one each
COMMANDS = (
    ("pip", "install", "--quiet", str(ROOT)),
    ("hf-robust-vision", "evaluate", "my-clip", "--dataset", "photos"),
)


def main() -> None:
    """Prepare, type the commands, and print what they took."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        programs = make_environment(place / "env")
        shutil.copytree(demo_checkpoint(), place / "my-clip")
        write_photos(place / "photos")
        took = [timed([programs / command[0], *command[1:]], place) for command in COMMANDS]
        results = json.loads((place / "outputs" / "evaluate" / "robustness.json").read_text())["results"]
    for command, (seconds, cpu) in zip(COMMANDS, took):
        print(f"{seconds:7.1f} s, {cpu:7.1f} s of CPU  {' '.join(command).replace(str(ROOT), '.')}")
    for row in results:
        accuracies = f"clean {row['clean_accuracy']:.1%}, robust {row['robust_accuracy']:.1%}"
        print(f"{row['num_samples']} photos, eps {row['eps'] * 255:g}/255: {accuracies}")
    print(f"{len(COMMANDS)} commands, {sum(seconds for seconds, _ in took):.0f} s, {os.cpu_count()} cores")


def make_environment(folder: Path) -> Path:
    """An environment of its own that finds this one's packages, but not this package; the folder of its programs."""
    venv.create(folder, with_pip=True)
    (inside,) = folder.glob("lib/python*/site-packages")
    (inside / "all-but-this.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def write_photos(folder: Path) -> None:
    """The demo's test pictures as a person keeps photos: one folder a class, no splits."""
    count: dict[int, int] = defaultdict(int)
    for row in demo_rows("test"):
        label = row["label"]
        if label < len(CLASSES) and count[label] < PER_CLASS:
            place = folder / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(row["image"], place / f"{count[label]}.png")
            count[label] += 1


def timed(command: list[str | Path], place: Path) -> tuple[float, float]:
    """Seconds, and seconds of CPU, of a command in a folder."""
    before, start = cpu_of_children(), time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, cwd=place, env=environment, check=True, stdout=sys.stderr)
    return time.perf_counter() - start, cpu_of_children() - before


def cpu_of_children() -> float:
    """Seconds of CPU that ended children have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
