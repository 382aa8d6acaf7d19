"""Time to robustness: how soon each setting reaches what the published one reaches in a given time.

`recipes/research/benchmark.py --parts robustness` calls it. The published setting, 10 attack steps in float32 with nothing
remembered, trains for the whole time; its robust accuracy at the end is what the others have to reach. Each of them is
screened with one seed for a quarter of that time at most; the soonest is run with the other seeds, beside the published
one. Validation images judge, at five points in time that do not count, by an attack that no training uses (APGD).

Every run is written down when it ends, so that a table that was interrupted goes on.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from benchmarks import demo_benchmark
from pool import digest
from transfer import read_config
from transformers import AutoProcessor

from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.demo import load_demo
from hf_robust_vision.data.splits import seeded_subset
from hf_robust_vision.evaluation.results import wilson_interval
from hf_robust_vision.files import write_atomically
from hf_robust_vision.methods.sim_clip import SimCLIPArguments, SimCLIPTrainer
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.report.tables import markdown_table
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.training.collapse import CollapseError
from hf_robust_vision.training.overfitting import CatastrophicOverfittingError


PUBLISHED = "published: 10 steps, fp32"
TWO: dict[str, Any] = {"attack_steps": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    PUBLISHED: {"attack_steps": 10},
    "2 steps": TWO,
    "2 steps, bf16": TWO | {"bf16": True},
    "2 steps, targets cached": TWO | {"cache_targets_mb": 1024},
    "2 steps on halves of the tokens": TWO | {"attack_token_share": 0.5},
    "2 steps at 40 pixels a side": TWO | {"attack_resolution": 40},
    "1 step, starts carried over": {"attack_steps": 1, "carry_starts_mb": 1024},
    "the free step alone, starts carried over": {"attack_steps": 0, "carry_starts_mb": 1024, "attack_free_step": True},
    "1 step on half of the tokens, then 2 on all": TWO | {"attack_token_share": 0.5, "attack_cheap_until": 0.7},
    "fast": {"fast": True},
    "fast, targets cached": {"fast": True, "cache_targets_mb": 1024},
}
POINTS = 5
JUDGES = 256  # validation images
WARMUP = 10  # updates
SCREENED = 0.25  # of the published setting's time


@dataclass(frozen=True)
class Task:
    """What is trained on and judged by.

    Args:
        about: For the page.
        checkpoint: The CLIP that every run starts from.
        templates: Of the prompts, by name.
        attack_eps: Radius of training and judge.
        load: From a transform to training and validation images.
        identity: Changes with checkpoint and data.
    """

    about: str
    checkpoint: str
    templates: str
    attack_eps: float
    load: Callable[[PixelTransform], tuple[LabelledImages, LabelledImages]]
    identity: str

    @cached_property
    def images(self) -> tuple[LabelledImages, LabelledImages]:
        """Training images, and the judges."""
        train, validation = self.load(load_encoder(self.checkpoint).transform)
        return train, seeded_subset(validation, JUDGES, seed=0)


def demo_task() -> Task:
    """The demo."""
    demo = demo_benchmark()

    def load(transform: PixelTransform) -> tuple[LabelledImages, LabelledImages]:
        return load_demo("train", transform), load_demo("validation", transform)

    return Task("the demo", str(demo.checkpoint), demo.templates, demo.attack_eps, load, demo.fingerprint)


def config_task(file: Path, data: Path | None, model: str | None) -> Task:
    """What a YAML file of `recipes/research/compare.py --config` trains on; its held-out photos judge."""
    table = read_config(file).table(None, {}, data, model)
    photos = table.benchmark

    def load(transform: PixelTransform) -> tuple[LabelledImages, LabelledImages]:
        (validation,) = photos.measured("validation", transform).values()
        return photos.training_images(transform), validation

    identity = digest({"photos": photos.identity})
    return Task(photos.train.name, str(photos.checkpoint), photos.templates, photos.attack_eps, load, identity)


@dataclass(frozen=True)
class Race:
    """How all runs are made.

    Args:
        task: What is learnt.
        seconds: Of training for the published setting.
        batch_size: Of an update.
        learning_rate: After the warm-up.
        device: "cpu" or "cuda".
        output_dir: Where finished runs are written.
        clock: Seconds; `time.process_time` where others use the machine, too.
    """

    task: Task
    seconds: float
    batch_size: int = 128
    learning_rate: float = 1e-3
    device: str = "cpu"
    output_dir: Path = Path("outputs/benchmark-robustness")
    clock: Callable[[], float] = field(default=time.perf_counter, compare=False)

    def now(self) -> float:
        """Seconds, when the device has done what it was told."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    def run(self, name: str, seed: int, seconds: float, target: float | None) -> Run:
        """One training, or what it gave when it was run before."""
        said = {
            "setting": SETTINGS[name],
            "seed": seed,
            "seconds": seconds,
            "target": target,
            "task": self.task.identity,
        }
        said |= {"batch_size": self.batch_size, "learning_rate": self.learning_rate, "clock": self.clock.__name__}
        said |= {"device": self.device, "torch": torch.__version__, "threads": torch.get_num_threads()}
        file = self.output_dir / f"{digest(said)}.json"
        if not file.is_file():
            run = train(self, name, seed, seconds, target)
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(asdict(run), indent=1) + "\n")
        values = json.loads(file.read_text(encoding="utf-8"))
        run = Run(**values | {"points": tuple(Point(**point) for point in values["points"])})
        print(f"{name}, seed {seed}: {run.said(target)}", file=sys.stderr, flush=True)
        return run


@dataclass(frozen=True)
class Point:
    """What the judges saw at one point in time; accuracies are fractions."""

    seconds: float
    updates: int
    clean: float
    robust: float


@dataclass(frozen=True)
class Run:
    """One training: its points, passes of an update, and why it ended before its time, if it did."""

    name: str
    seed: int
    passes: float
    points: tuple[Point, ...]
    stopped: str | None = None

    def reached(self, target: float) -> Point | None:
        """The first point at which so many judges were not fooled."""
        return next((point for point in self.points if point.robust >= target), None)

    def said(self, target: float | None) -> str:
        """In a few words."""
        if self.stopped is not None:
            return f"stopped: {self.stopped}"
        last = self.points[-1]
        found = last if target is None else self.reached(target)
        if found is None:
            return f"not in {last.seconds:.0f} s: robust {last.robust:.3f}, clean {last.clean:.3f}"
        return f"{found.seconds:.0f} s, {found.updates} updates: robust {found.robust:.3f}, clean {found.clean:.3f}"


def arguments(race: Race, name: str, seed: int) -> SimCLIPArguments:
    """Sim-CLIP's `frozen` form under one of `SETTINGS`."""
    task = race.task
    base = {
        "output_dir": tempfile.mkdtemp(), "form": "frozen", "attack_eps": task.attack_eps, "templates": task.templates,
        "learning_rate": race.learning_rate, "per_device_train_batch_size": race.batch_size, "max_steps": 1_000_000,
        "per_device_eval_batch_size": 64, "eval_protocol": "apgd-ce", "eval_attack_steps": 10, "logging_steps": 1_000_000,
        "seed": seed, "use_cpu": race.device == "cpu", "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return SimCLIPArguments(**base | SETTINGS[name])


def train(race: Race, name: str, seed: int, seconds: float, target: float | None) -> Run:
    """Train until the judges reach `target` or the time is up; they are asked at every fifth of it."""
    args = arguments(race, name, seed)
    torch.manual_seed(seed)
    training, judges = race.task.images
    encoder = load_encoder(race.task.checkpoint)
    processor = AutoProcessor.from_pretrained(race.task.checkpoint)
    trainer = SimCLIPTrainer(encoder, args, training, eval_dataset=judges, processing_class=processor)
    trainer.current_gradient_accumulation_steps = 1
    model, optimizer, loader = trainer.accelerator.prepare(
        trainer.model, trainer.create_optimizer(), trainer.get_train_dataloader()
    )
    points: list[Point] = []
    spent, updates, epoch, passes = 0.0, 0, 0, []
    try:
        while True:
            loader.set_epoch(epoch)
            for inputs in loader:
                start = race.now()
                for group in optimizer.param_groups:
                    group["lr"] = args.learning_rate * min((updates + 1) / WARMUP, 1)
                optimizer.zero_grad()
                trainer.training_step(model, inputs)
                optimizer.step()
                spent, updates = spent + race.now() - start, updates + 1
                passes.append(trainer._passes[-1])
                # By time, not by updates: a schedule has to know how far it is.
                trainer.state.global_step = updates
                trainer.state.max_steps = max(round(updates * seconds / spent), updates)
                if spent < seconds * (len(points) + 1) / POINTS:
                    continue
                metrics = trainer.evaluate()
                points.append(Point(spent, updates, metrics["eval_clean_accuracy"], metrics["eval_robust_accuracy"]))
                if spent >= seconds or (target is not None and points[-1].robust >= target):
                    return Run(name, seed, statistics.fmean(passes), tuple(points))
            epoch += 1
    except (CollapseError, CatastrophicOverfittingError) as error:
        return Run(name, seed, statistics.fmean(passes), tuple(points), str(error))


def robustness_table(race: Race, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Screen, run the winner and the published setting with all seeds, and say it as Markdown lines."""
    published = race.run(PUBLISHED, seeds[0], race.seconds, None)
    target, limit = published.points[-1].robust, SCREENED * race.seconds
    others = {name: race.run(name, seeds[0], limit, target) for name in names if name != PUBLISHED}
    lines = table({PUBLISHED: published} | others, target)
    winner = soonest(others, target, published.points[-1].clean)
    if winner is None:
        return [*lines, "", f"None reached {target:.3f} within {limit:.0f} s at a clean accuracy within a point."]
    slow = [published, *(race.run(PUBLISHED, seed, race.seconds, None) for seed in seeds[1:])]
    fast = [others[winner]]
    fast += [race.run(winner, run.seed, limit, run.points[-1].robust) for run in slow[1:]]
    return [*lines, "", *verdict(winner, slow, fast)]


def soonest(runs: Mapping[str, Run], target: float, clean: float) -> str | None:
    """The setting that reached the target first, with a clean accuracy of at most a point less than `clean`."""
    reached = {name: run.reached(target) for name, run in runs.items()}
    good = {
        name: point.seconds for name, point in reached.items() if point is not None and point.clean >= clean - 0.01
    }
    return min(good, key=lambda name: good[name]) if good else None


def table(runs: Mapping[str, Run], target: float) -> list[str]:
    """One row a setting, of the seed that it was screened with."""
    rows = []
    for name, run in runs.items():
        if not run.points:
            rows.append([name, f"{run.passes:.1f}", "stopped", "", "", "", ""])
            continue
        point = run.reached(target) or run.points[-1]
        low, high = wilson_interval(round(point.robust * JUDGES), JUDGES)
        said = "stopped" if run.stopped else f"{'' if point.robust >= target else 'not in '}{point.seconds:.0f}"
        interval = f"{low:.3f} to {high:.3f}"
        rows.append(
            [name, f"{run.passes:.1f}", said, point.updates, f"{point.robust:.3f}", interval, f"{point.clean:.3f}"]
        )
    head = ["setting", "passes", "seconds", "updates", "robust", "95 % interval", "clean"]
    return markdown_table(head, rows).splitlines()


def verdict(winner: str, slow: Sequence[Run], fast: Sequence[Run]) -> list[str]:
    """The winner against the published setting, seed by seed."""
    rows, ratios, losses = [], [], []
    for one, other in zip(slow, fast):
        target = one.points[-1].robust
        # The published setting may have been there before its time was up.
        long, short = one.reached(target), other.reached(target)
        assert long is not None
        found = short or (other.points[-1] if other.points else None)
        if short is not None:
            ratios.append(long.seconds / short.seconds)
            losses.append(one.points[-1].clean - short.clean)
        cells = ["", ""] if found is None else [f"{found.seconds:.0f}", f"{found.clean:.3f}"]
        if short is None:
            cells[0] = f"stopped {cells[0]}".strip() if other.stopped else f"not in {cells[0]}"
        rows.append(
            [one.seed, f"{target:.3f}", f"{long.seconds:.0f}", cells[0], f"{one.points[-1].clean:.3f}", cells[1]]
        )
    head = ["seed", "robust", "seconds, published", f"seconds, {winner}", "clean, published", f"clean, {winner}"]
    lines = markdown_table(head, rows).splitlines()
    if len(ratios) < len(slow):
        return [*lines, "", f"{winner} reached it with {len(ratios)} of {len(slow)} seeds."]
    spread = f"{min(ratios):.1f} to {max(ratios):.1f}" if len(ratios) > 1 else "one seed"
    said = f"{winner} is {statistics.fmean(ratios):.1f} times as soon ({spread}); clean accuracy is lower by"
    return [*lines, "", f"{said} {100 * statistics.fmean(losses):.1f} points in the mean."]
