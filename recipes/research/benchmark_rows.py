"""A million images to the first update: seconds and memory of each stage, on a generated Parquet data set.

    python recipes/research/benchmark_rows.py --rows 1280000 --output_dir outputs/rows
    accelerate launch --config_file recipes/accelerate/cpu_2proc.yaml recipes/research/benchmark_rows.py --rows 1280000 --streaming

Its images are a few thousand pictures of 16 px, repeated; what is measured is what grows with the number of rows: the index,
the splits, ids, class names and the order of the training. The files, and the copy of them that `datasets` makes once, are
written before the clock starts. Memory is Linux's: pages of a mapped file stand in it, and are given back when others need
them. The model is the demo CLIP. With `--resume_from_checkpoint` the run goes on in the middle; with `--streaming` the
training rows are read from the files as they come. Of several processes each number is that of the one with the most.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from transformers import AutoProcessor

from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.data.sources import ImageSource, load_labelled_images
from hf_robust_vision.methods.sim_clip import SimCLIPArguments, SimCLIPTrainer
from hf_robust_vision.pipeline.run_data import DataArguments, load_splits
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.processes import barrier, gather, meet, part, rank_and_world
from hf_robust_vision.report.tables import markdown_table
from hf_robust_vision.towers.load import load_encoder


CLASSES, PICTURES, SHARD = 1000, 2000, 64_000
LEAST_SHARDS = 4  # of the training rows, so that each of two processes has shards of its own in a stream
SPLITS = {"validation": 1000, "test": 2000}  # beside the training rows


def write_rows(folder: Path, split: str, rows: int, shards: int) -> None:
    """Parquet files of so many rows, as a data set of the Hub has them; what is there already stays."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(file, "JPEG")
        pictures.append(file.getvalue())
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": [f"class {number}" for number in range(CLASSES)]},
    }

    told = {"huggingface": json.dumps({"info": {"features": features}})}
    each = -(-rows // shards)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        file = folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        if file.is_file():
            continue
        places = range(shard * each, min((shard + 1) * each, rows))
        images = [{"bytes": pictures[place % PICTURES], "path": f"{split}-{place}.jpg"} for place in places]
        columns = {"image": images, "label": pa.array([place % CLASSES for place in places], pa.int64())}
        pq.write_table(pa.table(columns).replace_schema_metadata(told), file, row_group_size=1000)


def write_all(folder: Path, rows: int, streaming: bool) -> None:
    """All splits, and the copy that `datasets` makes of them once; in a stream it makes none of the training rows."""
    write_rows(folder, "train", rows, max(-(-rows // SHARD), LEAST_SHARDS))
    for split, count in SPLITS.items():
        write_rows(folder, split, count, 1)
    for split in SPLITS if streaming else ["train"]:
        load_labelled_images(ImageSource(folder), split, PixelTransform(64, (64, 64)), only_split=streaming)


class Stages:
    """Seconds, processor seconds and memory of one stage after the other, on this process."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, list[float]]] = [("imports", [math.nan, math.nan, *memory()])]
        self.at, self.cpu = time.perf_counter(), time.process_time()

    def end(self, name: str) -> None:
        """A stage is done."""
        now, used = time.perf_counter(), time.process_time()
        self.rows.append((name, [now - self.at, used - self.cpu, *memory()]))
        print(name, *(f"{number:.2f}" for number in self.rows[-1][1]), sep=" | ", file=sys.stderr, flush=True)
        self.at, self.cpu = now, used


def table(rows: int, processes: Sequence[Sequence[tuple[str, Sequence[float]]]]) -> str:
    """The stages of all processes as Markdown: of each number the largest; what was not measured is left empty."""
    head = [
        f"{rows:,} rows, {len(processes)} processes",
        "seconds",
        "processor seconds",
        "GiB",
        "peak with mapped files",
    ]
    cells = []
    for same in zip(*processes, strict=True):
        most = [max(numbers) for numbers in zip(*(numbers for _, numbers in same), strict=True)]
        said = ["" if math.isnan(value) else f"{value:.{digits}f}" for value, digits in zip(most, (1, 1, 2, 2))]
        cells.append([same[0][0], *said])
    return markdown_table(head, cells)


def run(args: argparse.Namespace, data: Path, stages: Stages) -> None:
    """Load, split and train, stage by stage."""
    folder = demo_checkpoint()
    encoder = load_encoder(folder)
    stages.end("the model")
    drawn = {"streaming": True, "validation_split": "validation"} if args.streaming else {"validation_size": 1000}
    options = DataArguments(dataset_name=str(data), **drawn)
    train, validation, _ = load_splits(options, 0, encoder.transform)
    stages.end("splits, ids, labels and class names")
    settings = SimCLIPArguments(
        output_dir=str(args.output_dir / "run"), max_steps=args.max_steps, per_device_train_batch_size=args.batch_size,
        attack_steps=2, report_to="none", disable_tqdm=True, logging_steps=1000, use_cpu=True,
        save_strategy="steps" if args.save_steps else "no", save_steps=args.save_steps or 500,
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(folder)
    trainer = SimCLIPTrainer(encoder, settings, train, eval_dataset=validation, processing_class=processor)
    stages.end("the trainer")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or None)
    stages.end(f"up to update {trainer.state.global_step}")


def main() -> None:
    """Time the stages, and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_280_000)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/rows"))
    parser.add_argument("--batch_size", type=int, default=16, help="of each process")
    parser.add_argument("--max_steps", type=int, default=1)
    parser.add_argument("--save_steps", type=int, default=0, help="0: no checkpoint")
    parser.add_argument("--resume_from_checkpoint", action="store_true")
    parser.add_argument("--streaming", action="store_true", help="read the training rows as they come")
    args = parser.parse_args()
    meet("cpu")
    first, data = rank_and_world()[0] == 0, args.output_dir / f"data-{args.rows}"
    if first:
        # In a process of its own, whose memory is not that of a run.
        spawn = multiprocessing.get_context("spawn")
        writer = spawn.Process(target=write_all, args=(data, args.rows, args.streaming))
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit(writer.exitcode)
    barrier()
    stages = Stages()
    run(args, data, stages)
    processes = gather([stages.rows])
    if first:
        print(table(args.rows, processes))
    part()


def memory() -> list[float]:
    """GiB that this process has to itself now, and that it held at most, with the pages of files that are mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return [int(fields[name].split()[0]) / 2**20 for name in ("RssAnon", "VmHWM")]


if __name__ == "__main__":
    main()
