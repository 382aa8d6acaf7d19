"""One method with one seed on a benchmark: how it is trained, saved, measured, and read back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from compare_methods import Method
from pool import QUIET, digest
from transformers import AutoProcessor, PrinterCallback
from transformers.utils import logging

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.splits import seeded_subset
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.evaluation.results import RESULTS_FILE, RobustnessResult, load_results, save_results
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot
from hf_robust_vision.files import write_atomically
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.towers.interpolate import interpolate_encoders
from hf_robust_vision.towers.load import Encoder, load_encoder
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.text_bank import make_text_bank


class Data(Protocol):
    """What a run asks of a benchmark, see `benchmarks.Benchmark` and `transfer.Transfer`."""

    @property
    def checkpoint(self) -> Path | str:
        """The CLIP that every method starts from."""

    @property
    def templates(self) -> str:
        """Of the prompts, by name."""

    @property
    def attack_eps(self) -> float:
        """Radius of the attack in fine-tuning, pixels in [0, 1]."""

    @property
    def identity(self) -> list[str]:
        """What tells it from another benchmark: hashes and class names."""

    def training_images(self, transform: PixelTransform) -> LabelledImages:
        """What a fine-tuning may see."""

    def measured(self, split: str, transform: PixelTransform) -> dict[str, LabelledImages]:
        """The parts that are measured, by name, each classified among the class names that it has."""


@dataclass(frozen=True)
class Budget:
    """A fine-tuning, but for what its method sets; together with that it names the folder of a tower."""

    steps: int
    batch_size: int
    learning_rate: float
    options: tuple[tuple[str, Any], ...] = ()  # further arguments of every trainer

    def training(self, benchmark: Data) -> dict[str, Any]:
        """As arguments of a trainer."""
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.steps // 10,
            "weight_decay": 1e-4,
            "max_grad_norm": 1.0,
            "attack_eps": benchmark.attack_eps,
            "attack_steps": 2,
            "templates": benchmark.templates,
            "on_collapse": "record",
            "probe_every": 0,  # it would cost passes, and the control has no attack to look at
        } | dict(self.options)


@dataclass(frozen=True)
class Measuring:
    """The measurement that all towers share."""

    protocol: str
    eval_steps: int
    images: int
    eps: tuple[float, ...]
    split: str

    def how(self) -> RobustnessProtocol:
        """One start of each attack."""
        return RobustnessProtocol(
            get_protocol(self.protocol, steps=self.eval_steps, restarts=1), self.eps, batch_size=64
        )


@dataclass(frozen=True)
class Run:
    """One method with one seed on a benchmark, and how much of what it learnt is taken over."""

    method: Method
    seed: int
    budget: Budget
    measuring: Measuring
    benchmark: Data
    root: Path
    source: str
    weight: float = 1.0  # of the hardened weights, the rest is the original's; chosen after training

    @property
    def tower(self) -> Path:
        """Folder named by a hash of every setting, so that a tower is only used again for the same settings."""
        shared: dict[str, Any] = {}
        if self.method.trainer:  # a default that changes makes another run, too; a new option that is off does not
            defaults = {item.name: item.default for item in fields(self.method.trainer.args_class)}
            shared |= {name: value for name, value in defaults.items() if isinstance(value, str | int | float)}
            shared |= self.budget.training(self.benchmark) | dict(self.method.options)
        shared["benchmark"] = self.benchmark.identity
        shared["prompts"] = get_templates(self.benchmark.templates)
        name = self.method.trainer.__name__ if self.method.trainer else "undefended"
        return self.root / f"{name}-{digest(shared)}" / f"seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Below the tower's, named by a hash of what is measured."""
        between = {} if self.weight == 1 else {"weight": self.weight}
        return self.tower / f"{self.measuring.split}-{digest(asdict(self.measuring) | between)}"

    def encoder(self) -> Encoder:
        """The model that is measured."""
        if self.method.trainer is None:
            return load_encoder(self.benchmark.checkpoint)
        hardened = load_encoder(self.tower)
        if self.weight == 1:
            return hardened
        return interpolate_encoders(load_encoder(self.benchmark.checkpoint), hardened, self.weight)

    @property
    def tokenizer(self) -> Any:
        """That of the checkpoint, which hardening leaves alone."""
        return load_tokenizer(self.benchmark.checkpoint)


def perform(run: Run) -> list[RobustnessResult]:
    """Train, save and measure one run, or read back what it left."""
    if (run.folder / RESULTS_FILE).is_file():
        return load_results(run.folder)
    _quiet()
    record = harden(run)
    cpu = time.process_time()
    results = measure(run)
    for result in results:
        result.training = record
    write_atomically(run.folder / "measuring.json", json.dumps({"cpu_seconds": time.process_time() - cpu}) + "\n")
    save_results(results, run.folder)
    return results


def harden(run: Run) -> dict[str, Any]:
    """Train and save a tower, and tell how it was made."""
    record: dict[str, Any] = {"method": "none", "seed": run.seed, "cpu_seconds": 0.0, "wall_seconds": 0.0}
    if run.method.trainer is None:
        return record | {"source": run.source}
    if (written := run.tower / "training.json").is_file():
        return dict(json.loads(written.read_text()))
    _quiet()
    trainer = make_trainer(run)
    wall, cpu = time.time(), time.process_time()
    trainer.train()
    record = trainer.training_record() | {"source": run.source}
    record |= {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.time() - wall}
    trainer.save_model(str(run.tower))
    write_atomically(written, json.dumps(record, indent=1) + "\n")
    return record


def make_trainer(run: Run) -> Any:
    """The trainer of a run, which has one."""
    assert run.method.trainer
    benchmark = run.benchmark
    encoder = load_encoder(benchmark.checkpoint)
    train = benchmark.training_images(encoder.transform)
    processor = AutoProcessor.from_pretrained(benchmark.checkpoint)
    trainer = run.method.trainer(encoder, arguments(run), train_dataset=train, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    return trainer


def arguments(run: Run) -> Any:
    """The arguments of its trainer; what that refuses is a ValueError."""
    assert run.method.trainer
    settings = run.budget.training(run.benchmark) | QUIET | dict(run.method.options) | {"seed": run.seed}
    make: Callable[..., Any] = run.method.trainer.args_class
    return make(output_dir=str(run.tower), **settings)


def measure(run: Run) -> list[RobustnessResult]:
    """Clean and robust accuracy on each part of the benchmark, among the class names of that part."""
    encoder, tokenizer, templates = run.encoder(), run.tokenizer, get_templates(run.benchmark.templates)
    results = []
    for group, part in run.benchmark.measured(run.measuring.split, encoder.transform).items():
        part = seeded_subset(part, run.measuring.images, seed=0)
        bank = make_text_bank(encoder, tokenizer, part.class_names, templates)
        name = "after" if run.method.trainer else "before"
        found = evaluate_zero_shot(
            encoder,
            bank,
            part,
            run.measuring.how(),
            model_name=name,
            samples_dir=run.folder,
            progress=False,
        )
        for result in found:
            result.group = group
        results += found
    return results


def hits(run: Run, result: RobustnessResult) -> list[float]:
    """1 for every sample that no attack fooled, in the order of the samples."""
    return [float(name is None) for name in fooled_by(run, result)]


def fooled_by(run: Run, result: RobustnessResult) -> list[str | None]:
    """What each sample fell to, in the order of the samples: "clean", an attack, or None."""
    lines = (run.folder / str(result.samples)).read_text().splitlines()
    return [json.loads(line)["fooled_by"] for line in lines]


def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
