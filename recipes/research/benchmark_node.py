"""What a node of GPUs needs to be fed: images that a core decodes, crops and collates, against what the GPUs would take.

The core's part is measured here, on photos in JPEG of ImageNet's usual size. The GPUs' part is arithmetic: passes of an
update (`passes.py`), operations of a pass, and what an H100 does at its best, of which a stated share is assumed. No GPU
was used for it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from passes import passes_of
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.methods.sim_clip import SimCLIPArguments, SimCLIPTrainer
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.report.tables import markdown_table


GPUS, PEAK, SHARE = (
    8,
    989e12,
    0.4,
)  # H100 SXM, dense bfloat16, operations a second; what is assumed to be reached of it
EPOCH = 1_281_167  # images of ImageNet-1k's training split
PHOTO, QUALITY, PHOTOS = (500, 375), 95, 64
TOWERS = {
    "ViT-B/32, 224 px": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                         "patch_size": 32, "image_size": 224},
    "ViT-B/16, 224 px": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                         "patch_size": 16, "image_size": 224},
    "ViT-L/14, 224 px": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                         "patch_size": 14, "image_size": 224},
    "ViT-L/14, 336 px": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                         "patch_size": 14, "image_size": 336},
}  # fmt: skip


def photos(size: int) -> LabelledImages:
    """Pictures with detail at every scale, as files; they are cropped to `size`."""
    random, rows = np.random.default_rng(0), []
    for label in range(PHOTOS):
        picture = np.zeros((PHOTO[1], PHOTO[0], 3))
        for side in (4, 16, 64, 256):  # as in photos, coarse detail is strong and fine detail weak
            noise = Image.fromarray(random.integers(0, 256, (side, side, 3)).astype(np.uint8))
            picture += np.asarray(noise.resize(PHOTO, Image.Resampling.BICUBIC), float) / side**0.15
        picture = 255 * (picture - picture.min()) / (picture.max() - picture.min())
        file = io.BytesIO()
        Image.fromarray(picture.astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": label % 2})
    return LabelledImages(rows, ["a", "b"], PixelTransform(size, (size, size)), name="photos", split="train")


def seconds(do: Callable[[], object], rounds: int) -> float:
    """Processor time, the least of so many rounds: on a busy machine the others say more of it than of this."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        do()
        times.append(time.process_time() - start)
    return min(times)


def operations(tower: dict[str, int]) -> float:
    """Of a forward pass of one image."""
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**tower))
        image = torch.zeros(1, 3, tower["image_size"], tower["image_size"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return float(counter.get_total_flops())


def passes(steps: int) -> int:
    """Of an update of Sim-CLIP's frozen form, for each image."""
    options = {"attack_steps": steps, "form": "frozen", "use_cpu": True, "report_to": "none"}
    return passes_of(SimCLIPTrainer, SimCLIPArguments(output_dir="unused", **options)).image


def core(size: int, rounds: int) -> tuple[float, list[float]]:
    """Kilobytes of a file, and processor seconds an image: to decode and crop it, to collate it, to copy it once more."""
    data = photos(size)
    items = [data[place] for place in range(PHOTOS)]
    batch = collate_images(items)["images"]
    other = torch.empty_like(batch)
    parts = [
        seconds(lambda: [data[place] for place in range(PHOTOS)], rounds),
        seconds(lambda: collate_images(items), rounds),
        seconds(lambda: [other.copy_(batch) for _ in range(10)], rounds) / 10,
    ]
    kilobytes = sum(len(row["image"]["bytes"]) for row in data.rows) / 1000
    return kilobytes / PHOTOS, [part / PHOTOS for part in parts]


def node_table(rounds: int, steps: Sequence[int] = (2, 10)) -> list[str]:
    """What a core delivers, then what the GPUs would take, and cores for that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cores = {size: core(size, rounds) for size in sorted({tower["image_size"] for tower in TOWERS.values()})}
    finally:
        torch.set_num_threads(threads)
    head = ["size", "file, kB", "decode and crop, images/s of a core", "collate", "copy once more"]
    delivers = [
        [f"{size} px", f"{kb:.0f}", *(f"{1 / part:,.0f}" for part in parts)] for size, (kb, parts) in cores.items()
    ]
    cells = []
    for name, tower in TOWERS.items():
        work = operations(tower)
        for count in steps:
            takes = GPUS * PEAK * SHARE / (work * passes(count))
            needs = takes * sum(cores[tower["image_size"]][1])
            numbers = [f"{work / 1e9:.1f}", f"{takes:,.0f}", f"{EPOCH / takes / 60:.1f}", f"{needs:,.0f}"]
            cells.append([name, count, passes(count), *numbers])
    columns = [
        "tower",
        "attack steps",
        "passes",
        "Gflop a forward pass",
        "images/s of the node",
        "minutes an epoch",
        "cores",
    ]
    return [
        *markdown_table(head, delivers).splitlines(),
        "",
        f"{GPUS} H100 at {100 * SHARE:.0f} % of {PEAK / 1e12:.0f} Tflop/s each in bfloat16, by arithmetic; Sim-CLIP's frozen form. An epoch is",
        f"one of ImageNet-1k, {EPOCH:,} images. Cores are those that decode, crop, collate and copy, as measured above; a",
        "cache of decoded images, or JPEG decoding on the GPU, needs fewer.",
        "",
        *markdown_table(columns, cells).splitlines(),
    ]
