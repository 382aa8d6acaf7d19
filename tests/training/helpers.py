"""A trainer on the tiny model, Sim-CLIP's by default, shared by the trainer tests and by the processes they start."""

from __future__ import annotations

import datasets
import torch
from transformers import AutoProcessor

from hf_robust_vision.data.datasets import LabelledImages, StreamedImages
from hf_robust_vision.methods.sim_clip import SimCLIPArguments, SimCLIPTrainer
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.training.base import AdversarialTrainer
from hf_robust_vision.training.config import AdversarialTrainingArguments
from tests.conftest import make_dataset


SGD = {
    "optim": "sgd",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "learning_rate": 0.01,
}


def arguments(output_dir, kind=SimCLIPArguments, **changes) -> AdversarialTrainingArguments:
    settings = {
        "output_dir": str(output_dir), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 3,
        "per_device_train_batch_size": 6, "per_device_eval_batch_size": 6, "learning_rate": 1e-4, "attack_eps": "1/255",
        "attack_steps": 2, "eval_attack_steps": 2, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no",
        "templates": "demo", "seed": 0,
    }  # fmt: skip
    return kind(**(settings | changes))


def make_trainer(
    clip_folder,
    output_dir,
    *,
    kind=SimCLIPTrainer,
    double=False,
    train: LabelledImages | StreamedImages | None = None,
    callbacks=None,
    reference=None,
    optimizers=(None, None),
    **changes,
) -> AdversarialTrainer:
    encoder = load_encoder(clip_folder, dtype=torch.float64 if double else torch.float32)
    return kind(
        model=encoder,
        args=arguments(output_dir, kind.args_class, **changes),
        train_dataset=train or make_dataset(24),
        eval_dataset=make_dataset(9, "validation", 100),
        processing_class=AutoProcessor.from_pretrained(clip_folder),
        callbacks=callbacks,
        reference=reference,
        optimizers=optimizers,
    )


def make_stream(count: int = 10, shards: int = 2) -> StreamedImages:
    """The first training images as a shuffled stream; with two shards each of two processes reads one."""
    images = make_dataset(count)
    rows = datasets.Dataset.from_list([{"image": row["image"], "label": row["label"]} for row in images.rows])
    stream = rows.to_iterable_dataset(num_shards=shards).shuffle(seed=0, buffer_size=4)
    return StreamedImages(stream, images.class_names, images.transform, name="tiny", split="train")


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.whole_encoder().state_dict().items()}


def largest_gap(one, other) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)
