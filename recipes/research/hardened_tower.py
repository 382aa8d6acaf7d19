"""One hardened tower of `compare_towers.py`: how it is made, and how a VLM that sees through it is asked.

A CLIP tower is swapped into the VLM; a tower of the VLM's own is hardened in place.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pool import QUIET, digest
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PrinterCallback

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.demo import CLASS_NAMES, DEMO_EPS, demo_checkpoint, load_demo
from hf_robust_vision.data.demo_questions import load_questions
from hf_robust_vision.data.splits import seeded_subset
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.evaluation.results import RobustnessResult, source_hash
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks import VLMProtocol, evaluate_vqa
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot
from hf_robust_vision.files import write_atomically
from hf_robust_vision.methods.fare import FARETrainer
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.swap import swap_vision_encoder
from hf_robust_vision.towers.base import EncoderOutput, Reads
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.text_bank import make_text_bank
from hf_robust_vision.towers.vlm import LanguageReader, VLMEncoder
from hf_robust_vision.training.config import Radius


METHODS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "sim-clip": ("Sim-CLIP", SimCLIPTrainer, {"form": "frozen"}),
    "fare": ("FARE", FARETrainer, {}),
}

SET_BY_ALL = ("feature", "learning_rate", "output_dir", "seed")  # of all rows, or elsewhere


@dataclass(frozen=True)
class Row:
    """One way to harden; the empty one is the original tower."""

    method: str = ""
    feature: str = ""
    changes: tuple[tuple[str, str], ...] = ()  # arguments of the trainer that differ from what all rows share

    @property
    def label(self) -> str:
        """As the page names it."""
        if not self.method:
            return "original"
        return ", ".join(
            [METHODS[self.method][0], f"`{self.feature}`", *(f"{name} {to}" for name, to in self.changes)]
        )

    def value(self, name: str, text: str) -> Any:
        """What an argument of the trainer is given, by the type of its default.

        Raises:
            ValueError: If there is no such argument, a row does not set it, or the text is not of its type.
        """
        arguments = METHODS[self.method][1].args_class
        defaults = {item.name: item.default for item in fields(arguments)}
        if name not in defaults or name in SET_BY_ALL:
            raise ValueError(f"{name} is no argument of {METHODS[self.method][0]} that a row may set.")
        default = defaults[name]
        if isinstance(default, bool):
            if text not in ("true", "false"):
                raise ValueError(f"{name} is true or false, got {text!r}.")
            return text == "true"
        try:
            return int(text) if isinstance(default, int) else text if isinstance(default, str) else Radius(text)
        except ValueError as error:
            raise ValueError(f"{name} is a number, got {text!r}.") from error


@dataclass(frozen=True)
class Training:
    """One hardened tower: a row, a seed, and what all share."""

    row: Row
    seed: int
    learning_rate: float
    steps: int
    batch_size: int
    vlm: str = "demo-llava"  # whose tower it is, or is to be

    def arguments(self) -> dict[str, Any]:
        """As arguments of the trainer, all but the seed."""
        shared = METHODS[self.row.method][2] | {
            "feature": self.row.feature,
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": self.steps // 10,
            "weight_decay": 1e-4,
            "max_grad_norm": 1.0,
            "attack_eps": DEMO_EPS,
            "attack_steps": 2,
            "templates": "demo",
            "on_collapse": "record",
        }
        return shared | {name: self.row.value(name, text) for name, text in self.row.changes}

    def folder(self, root: Path) -> Path:
        """Named by a hash of every setting and of the model it starts from: a tower is only used again for the same."""
        if not self.row.method:
            return root / "original"
        defaults = {item.name: item.default for item in fields(METHODS[self.row.method][1].args_class)}
        known = {name: value for name, value in defaults.items() if isinstance(value, str | int | float | None)}
        settings = known | self.arguments() | {"clip": sha256(demo_checkpoint())}
        if "language_tokens" in Reads(self.row.feature) or not sees_by_clip(self.vlm):
            settings |= {"vlm": sha256(folder_of(self.vlm))}
        return root / f"{self.row.method}-{self.row.feature}-{digest(settings)}" / f"seed{self.seed}"


@dataclass(frozen=True)
class Measuring:
    """How towers are measured."""

    split: str
    eps: tuple[float, ...]
    questions: int
    attack_steps: int
    restarts: int
    images: int  # for zero-shot accuracy, which a tower of the VLM's own has not
    zero_shot_steps: int
    vlm: str = "demo-llava"  # that is asked

    def folder(self, tower: Path) -> Path:
        """Below the tower's, named by a hash of every setting and of both checkpoints."""
        settings = {name: value for name, value in asdict(self).items() if name != "vlm"}
        checkpoints = {"demo-clip": sha256(demo_checkpoint()), Path(self.vlm).name: sha256(folder_of(self.vlm))}
        return tower / f"{self.split}-{digest(settings | checkpoints)}"


def folder_of(vlm: str) -> Path:
    """Of a demo VLM by its name, or the folder that is named."""
    return Path(vlm) if Path(vlm).is_dir() else demo_checkpoint(vlm)


@cache
def sees_by_clip(vlm: str) -> bool:
    """Whether a CLIP tower can be swapped in."""
    return bool(AutoConfig.from_pretrained(folder_of(vlm)).vision_config.model_type == "clip_vision_model")


@cache
def sha256(folder: Path) -> str:
    """Of a model's weights in one file."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


class TowerTokens:
    """Gives a `VLMEncoder` patch tokens, too: what its tower hands to the projector."""

    def forward(self: Any, images: Tensor, token_layer: int | None = None, **asked: Any) -> EncoderOutput:
        """Encode images in [0, 1]; `patch_tokens` for any `token_layer`, always the last."""
        handed: list[Tensor] = []
        seen = self.tower.register_forward_hook(lambda module, args, output: handed.append(output.last_hidden_state))
        try:
            output: EncoderOutput = super().forward(images, **asked)  # type: ignore[misc]
        finally:
            seen.remove()
        if token_layer is not None:
            output["patch_tokens"] = handed[0].reshape(len(images), -1, handed[0].shape[-1])
        return output

    encode_images = forward


def starting_point(training: Training) -> Any:
    """The encoder to harden: the demo's CLIP, read by the VLM if need be, or the VLM's own tower."""
    if sees_by_clip(training.vlm):
        encoder = load_encoder(demo_checkpoint())
        if "language_tokens" in Reads(training.row.feature):
            encoder.read_by(LanguageReader(str(folder_of(training.vlm))))
        return encoder
    encoder = load_encoder(folder_of(training.vlm))
    encoder.__class__ = type("TowerTokensOf" + type(encoder).__name__, (TowerTokens, type(encoder)), {})
    return encoder


def harden(training: Training, tower: Path) -> dict[str, Any]:
    """Train and save a tower, and tell how it was made."""
    written = tower / "training.json"
    if not training.row.method:
        return {"method": "none", "seed": None, "cpu_seconds": 0.0}
    if written.is_file():
        return dict(json.loads(written.read_text()))
    _, trainer_class, _ = METHODS[training.row.method]
    encoder = starting_point(training)
    settings = training.arguments() | QUIET | {"seed": training.seed}
    whole = isinstance(encoder, VLMEncoder)  # its processor lies beside its weights
    trainer = trainer_class(
        encoder,
        trainer_class.args_class(output_dir=str(tower), **settings),
        train_dataset=load_demo("train", encoder.transform),
        processing_class=None if whole else AutoProcessor.from_pretrained(demo_checkpoint()),
    )
    trainer.remove_callback(PrinterCallback)
    start, source = time.process_time(), source_hash()
    trainer.train()
    record = trainer.training_record()
    record |= {"cpu_seconds": time.process_time() - start, "learning_rate": training.learning_rate, "source": source}
    trainer.save_model(str(tower))
    write_atomically(written, json.dumps(record, indent=1) + "\n")
    return record


def measure(
    training: Training, measuring: Measuring, tower: Path, folder: Path, record: Mapping[str, Any]
) -> list[RobustnessResult]:
    """Answers of the VLM with this tower, and a CLIP tower as a zero-shot classifier."""
    name = "after" if training.row.method else "before"
    swapped = sees_by_clip(measuring.vlm)
    source = tower if training.row.method else demo_checkpoint() if swapped else folder_of(measuring.vlm)
    start = folder_of(measuring.vlm) if swapped else source
    processor = AutoProcessor.from_pretrained(folder_of(measuring.vlm))
    vlm = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32).eval()
    drift = {}
    if swapped:
        report = swap_vision_encoder(vlm, source, processor=processor)
        report.save(folder)
        drift = {"drift": report.towers[0].drift}
    found = evaluate_vqa(
        vlm,
        processor,
        load_questions(measuring.split, yes_no=False, limit=measuring.questions),
        VLMProtocol(measuring.eps, steps=measuring.attack_steps, restarts=measuring.restarts, batch_size=50),
        prompt="{}",  # in the chat template
        model_name=name,
        dataset="easy-vqa",
        split=measuring.split,
        group="colour/shape",
        samples_dir=folder,
        progress=False,
    )
    if swapped and measuring.images:
        found += zero_shot(load_encoder(source), measuring, name, folder)
    for result in found:
        result.training = dict(record) | drift
    return found


def zero_shot(encoder: Any, measuring: Measuring, name: str, folder: Path) -> list[RobustnessResult]:
    """The demo's images among all class names at DEMO_EPS."""
    tokenizer = AutoProcessor.from_pretrained(demo_checkpoint()).tokenizer
    return evaluate_zero_shot(
        encoder,
        make_text_bank(encoder, tokenizer, CLASS_NAMES, get_templates("demo")),
        seeded_subset(load_demo(measuring.split, encoder.transform), measuring.images, seed=0),
        RobustnessProtocol(get_protocol("apgd-ce", steps=measuring.zero_shot_steps), (DEMO_EPS,), batch_size=64),
        model_name=name,
        samples_dir=folder,
        progress=False,
    )
