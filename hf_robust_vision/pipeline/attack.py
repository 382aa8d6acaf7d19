"""Adversarial images as files: what `hf-robust-vision attack` calls."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.evaluation.engine import evaluate
from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.results import RobustnessResult, load_samples
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import ZeroShot
from hf_robust_vision.hub.adversarial import (
    CARD_NAME,
    IMAGES_NAME,
    RECORD_NAME,
    AttackedImage,
    AttackRecord,
    write_dataset,
)
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.text_bank import make_text_bank

from .measure import EvaluationSet, load_model, measure_model


def attack_images(
    model: str,
    data: EvaluationSet,
    how: RobustnessProtocol,
    output_dir: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> AttackRecord:
    """Attack the images of a dataset, and write them as `output_dir/images/<class>/<id>.png` with `attack.json`.

    `README.md` and `metadata.parquet` beside them make the folder a data set that `load_dataset` reads; its card says
    that the images show transfer only.

    The images are as large as they were under attack: the tower's size, or `data.resolution`. The exact floats, and
    `robustness.json`, lie beside them, as `measure_model` writes them; an interrupted call goes on from there.

    Args:
        model: Folder or Hub id of a `CLIPModel`, or "demo-clip".
        data: The images with their classes.
        how: The attacks, at one radius.
        output_dir: Where files and record go.
        name: What the record calls the model; by default its id, or the name of its folder.
        revision: Branch, tag or commit of the model.
        device: By default a GPU where there is one.
        dtype: Of the model under attack.
        progress: Show a bar.

    Raises:
        ValueError: If there is more than one radius, `output_dir` already holds attacked images, or as `measure_model`.
    """
    folder = Path(output_dir)
    if len(how.eps) != 1:
        raise ValueError(f"attacked images are of one radius, got {len(how.eps)}; name one --eps.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("attack runs in one process; to share the samples out type evaluate --save_adversarial.")
    if (folder / RECORD_NAME).exists() or (folder / IMAGES_NAME).exists():
        raise ValueError(f"--output_dir {folder} holds attacked images already; name another one.")
    if (folder / CARD_NAME).exists():
        raise ValueError(f"--output_dir {folder} holds a {CARD_NAME}, which would be replaced; name another one.")
    where: dict[str, Any] = {"revision": revision, "device": device, "dtype": dtype}
    (result,) = measure_model(model, [data], how, folder, name=name, save_adversarial=True, progress=progress, **where)
    images = write_images(result, folder)
    same = (
        "model",
        "model_sha256",
        "dataset",
        "dataset_id",
        "split",
        "eps",
        "norm",
        "protocol",
        "attacks",
        "versions",
    )
    record = AttackRecord(
        **{field: getattr(result, field) for field in same},
        seed=how.seed,
        clean_accuracy=result.clean_accuracy,
        robust_accuracy=result.robust_accuracy,
        files_accuracy=accuracy_on(images, folder, result, load_model(model, **where)),
        images=images,
        class_names=result.class_names,
    )
    write_dataset(record, result, folder)
    return record


def write_images(result: RobustnessResult, folder: Path) -> list[AttackedImage]:
    """Write the saved images of a result, which lie in `folder`, as picture files into its `images`, all or none."""
    saved, names = AdversarialImages(folder / str(result.images)), result.class_names
    draft, images = folder / f".{IMAGES_NAME}.{os.getpid()}", []
    try:
        for record in load_samples(folder / str(result.samples)):
            label = names[int(record.label)]
            place = Path(quote(label, safe=" "), f"{quote(str(record.id), safe=' ')}.png")
            (draft / place).parent.mkdir(parents=True, exist_ok=True)
            _picture(saved.read(record.id, result.eps)[1]).save(draft / place)
            answers = (
                names[int(record.clean)],
                None if record.adversarial is None else names[int(record.adversarial)],
            )
            images.append(
                AttackedImage(f"{IMAGES_NAME}/{place.as_posix()}", record.id, label, *answers, record.fooled_by)
            )
        draft.rename(folder / IMAGES_NAME)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return images


def accuracy_on(
    images: Sequence[AttackedImage], folder: Path, result: RobustnessResult, model: tuple[DualEncoder, Any]
) -> float:
    """Share of picture files that a model takes for their class, without any attack."""
    encoder, tokenizer = model
    # By place and not by name: two classes may have one name.
    labels = {record.id: record.label for record in load_samples(folder / str(result.samples))}
    rows = [{"image": str(folder / one.file), "label": labels[one.id]} for one in images]
    files = LabelledImages(rows, result.class_names, encoder.transform, name=result.dataset, split=result.split)
    bank = make_text_bank(encoder, tokenizer, result.class_names, result.templates)
    clean = RobustnessProtocol(get_protocol("quick"), (0.0,))
    (found,) = evaluate(ZeroShot(encoder, bank, files), clean, model_name=result.model, progress=False)
    return found.clean_accuracy


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
