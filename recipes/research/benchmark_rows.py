"""A million images to the first update: seconds and memory of each stage, on a generated Parquet data set.

    python recipes/research/benchmark_rows.py --rows 1280000 --output_dir outputs/rows

Its images are a few thousand pictures of 16 px, repeated; what is measured is what grows with the number of rows: the index,
the splits, ids, class names and the order of the training. The files, and the copy of them that `datasets` makes once, are
written before the clock starts. Memory is Linux's: pages of a mapped file stand in it, and are given back when others need
them. The model is the demo CLIP. With `--resume_from_checkpoint` the run goes on in the middle.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import sys
import time
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
from hf_robust_vision.report.tables import markdown_table
from hf_robust_vision.towers.load import load_encoder


CLASSES, PICTURES, SHARD = 1000, 2000, 64_000


def write_rows(folder: Path, split: str, rows: int) -> None:
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
    shards = -(-rows // SHARD)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        file = folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        if file.is_file():
            continue
        places = range(shard * SHARD, min((shard + 1) * SHARD, rows))
        images = [{"bytes": pictures[place % PICTURES], "path": f"{split}-{place}.jpg"} for place in places]
        columns = {"image": images, "label": pa.array([place % CLASSES for place in places], pa.int64())}
        pq.write_table(pa.table(columns).replace_schema_metadata(told), file, row_group_size=1000)


def write_all(folder: Path, rows: int) -> None:
    """Both splits, and the copy that `datasets` makes of them once."""
    for split, count in (("train", rows), ("test", 2000)):
        write_rows(folder, split, count)
    load_labelled_images(ImageSource(folder), "train", PixelTransform(64, (64, 64)))


def main() -> None:
    """Time the stages, and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_280_000)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/rows"))
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_steps", type=int, default=1)
    parser.add_argument("--save_steps", type=int, default=0, help="0: no checkpoint")
    parser.add_argument("--resume_from_checkpoint", action="store_true")
    args = parser.parse_args()
    data = args.output_dir / f"data-{args.rows}"
    # In a process of its own, whose memory is not that of a run.
    writer = multiprocessing.get_context("spawn").Process(target=write_all, args=(data, args.rows))
    writer.start()
    writer.join()
    if writer.exitcode:
        sys.exit(writer.exitcode)
    rows_of: list[list[str]] = []
    at, cpu, begun = time.perf_counter(), time.process_time(), memory()

    def stage(name: str) -> None:
        nonlocal at, cpu
        now, used = time.perf_counter(), time.process_time()
        rows_of.append([name, f"{now - at:.1f}", f"{used - cpu:.1f}", *memory()])
        print(*rows_of[-1], sep=" | ", file=sys.stderr, flush=True)
        at, cpu = now, used

    folder = demo_checkpoint()
    encoder = load_encoder(folder)
    stage("the model")
    options = DataArguments(dataset_name=str(data), validation_size=1000)
    train, validation, _ = load_splits(options, 0, encoder.transform)
    stage("splits, ids, labels and class names")
    settings = SimCLIPArguments(
        output_dir=str(args.output_dir / "run"), max_steps=args.max_steps, per_device_train_batch_size=args.batch_size,
        attack_steps=2, report_to="none", disable_tqdm=True, logging_steps=1000, use_cpu=True,
        save_strategy="steps" if args.save_steps else "no", save_steps=args.save_steps or 500,
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(folder)
    trainer = SimCLIPTrainer(encoder, settings, train, eval_dataset=validation, processing_class=processor)
    stage("the trainer")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or None)
    stage(f"up to update {trainer.state.global_step}")
    head = [f"{args.rows:,} rows", "seconds", "processor seconds", "GiB", "peak with mapped files"]
    print(markdown_table(head, [["imports", "", "", *begun], *rows_of]))


def memory() -> list[str]:
    """GiB that this process has to itself now, and that it held at most, with the pages of files that are mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return [f"{int(fields[name].split()[0]) / 2**20:.2f}" for name in ("RssAnon", "VmHWM")]


if __name__ == "__main__":
    main()
