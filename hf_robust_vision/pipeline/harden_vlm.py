"""Harden the vision tower of a VLM in place, where its language model looks; and say what that did."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from hf_robust_vision.attacks import StartNoise, make_ball, pgd
from hf_robust_vision.data.datasets import LabelledImages, StreamedImages
from hf_robust_vision.data.demo import DEMO_NAME, load_demo, refuse_ignored, shipped
from hf_robust_vision.data.demo_questions import load_questions
from hf_robust_vision.data.sources import ImageSource, load_labelled_images, stream_images
from hf_robust_vision.data.splits import without_corrupt
from hf_robust_vision.evaluation.engine import evaluate
from hf_robust_vision.evaluation.results import RobustnessResult, save_results, versions
from hf_robust_vision.evaluation.tasks import VLMProtocol
from hf_robust_vision.evaluation.tasks.vqa import VQA
from hf_robust_vision.files import read_json, write_atomically
from hf_robust_vision.methods.features import FeatureDistance, token_variances
from hf_robust_vision.methods.sim_clip import SimCLIPArguments, SimCLIPTrainer
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.processes import announce, part, usable_cores
from hf_robust_vision.report.tables import comparison_text
from hf_robust_vision.terminal import next_steps, quiet_when_piped, user_errors
from hf_robust_vision.towers.base import EncoderOutput, attack_mode, weights_sha256
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.records import HARDEN_REPORT
from hf_robust_vision.towers.vlm import VLMEncoder, path_of
from hf_robust_vision.towers.weights import reading
from hf_robust_vision.training.config import Radius
from hf_robust_vision.training.publishing import check_push

from .arguments import parse
from .card import describe
from .estimate import say_cost
from .harden import part_and_push
from .run_data import SCAN_LIMIT
from .run_folder import check_folder, run_folder


PROBES = 32  # images that the tokens are compared on


@dataclass
class VLMArguments:
    """What to harden, on which images, and how to measure it.

    Args:
        model_name_or_path: Folder or Hub id of a VLM; by default the demo LLaVA.
        model_revision: Branch, tag or commit of the model.
        dataset_name: Folder of images, or name of a dataset; no labels are needed. By default the demo's images.
        dataset_config: Configuration of a Hub dataset.
        train_split: Split to fine-tune on; of a folder without it all images.
        image_column: By default found.
        streaming: Stream the images.
        skip_corrupt: Count and leave out images that can not be decoded.
        resolution: Side in pixels of the square images that train a tower of free image size.
        train_projector: Train the projector, too, and not the vision tower alone.
        measure: Ask the demo's questions under attack before and after, where the demo is hardened.
        prompt: Of those questions, with "{}" for the question; without the image token it goes through the model's chat
            template.
        num_questions: How many of them.
        test_eps: Radii of that attack.
        test_steps: Its steps of PGD on loss and margin.
        test_restarts: Random starts of each.
        overwrite: Replace what an earlier run left in `output_dir`.
        cpu_threads: Threads of each process on a CPU; 0 shares the cores out evenly.
    """

    about: ClassVar[str] = (
        "the vision tower inside a VLM, in place; the language model is neither run nor loaded. The command line takes the "
        "model's name in the first place, too."
    )

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id; default: the demo LLaVA.", "aliases": ["--model"]}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Images; default: the demo's.", "aliases": ["--dataset"]}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to fine-tune on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the image; default: found."})
    streaming: bool = field(default=False, metadata={"help": "Stream the images."})
    skip_corrupt: bool = field(default=False, metadata={"help": "Count and leave out broken images."})
    resolution: int | None = field(default=None, metadata={"help": "Side of square images for towers of free size."})
    train_projector: bool = field(default=False, metadata={"help": "Train the projector, too."})
    measure: bool = field(default=True, metadata={"help": "Ask the demo's questions before and after."})
    prompt: str = field(default="{}", metadata={"help": "Of those questions; default: the chat template's."})
    num_questions: int = field(default=300, metadata={"help": "How many questions."})
    test_eps: list[Radius] = field(
        default_factory=lambda: [Radius("8/255"), Radius("16/255")],
        metadata={"help": "Radii of the reported numbers."},
    )
    test_steps: int = field(default=50, metadata={"help": "Steps of the attack on the answers."})
    test_restarts: int = field(default=2, metadata={"help": "Random starts of each objective."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier run in output_dir."})
    cpu_threads: int | None = field(default=None, metadata={"help": "Threads of a process on a CPU; 0: all cores."})

    def __post_init__(self) -> None:
        self.test_eps = [Radius(eps) for eps in self.test_eps]
        for name in ("num_questions", "test_steps", "test_restarts", "resolution"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


@dataclass
class VLMTrainingArguments(SimCLIPArguments):
    """Those of Sim-CLIP, at what the language model reads."""

    feature: str = field(default="language_tokens", metadata={"help": "What is drawn to the original's."})
    attack_steps: int = field(default=2, metadata={"help": "Gradient steps of the training attack."})


class VLMTrainer(SimCLIPTrainer):
    """Sim-CLIP on a VLM's own tower."""

    args_class = VLMTrainingArguments


@dataclass(frozen=True)
class HardenReport:
    """What hardening a VLM in place did, and what leads back.

    Distances are squared errors of what the language model reads, over its variance, to the original's on the clean
    image, under PGD at the training radius.
    """

    model: str  # class of the VLM
    original: str  # folder's name or Hub id: loading it again is the way back
    revision: str | None
    tower: str  # dotted name in the model
    parameters: int  # of tower and projector
    changed: int  # how many of them have another value now
    tower_sha256_before: str
    tower_sha256_after: str
    rest_sha256: str  # of all other weights, the language model's among them: the same before and after
    clean_cosine: float  # mean over tokens, the original's and the hardened one's of clean images
    attacked_before: float  # distance
    attacked_after: float
    images: int  # that these were measured on
    training: dict[str, Any]
    versions: dict[str, str]

    def save(self, folder: str | Path) -> Path:
        """Write `harden_report.json` into a folder, and return its path."""
        target = Path(folder) / HARDEN_REPORT
        write_atomically(target, json.dumps({"schema": 1, **asdict(self)}, indent=2, allow_nan=False) + "\n")
        return target

    def __str__(self) -> str:
        return (
            f"{self.model}: {self.changed:,} of {self.parameters:,} weights of {self.tower} changed; all others, the "
            f"language model's among them, are those of {self.original}.\nWhat the language model reads of {self.images} "
            f"images: clean, cosine {self.clean_cosine:.3f} to the original's; under attack, distance "
            f"{self.attacked_before:.3f} before, {self.attacked_after:.3f} after."
        )


def main(words: Sequence[str] | None = None, prog: str | None = None) -> tuple[Path, list[RobustnessResult]]:
    """Read the words of a command line, and `harden_vlm`: where it lies, and the results; bad input ends in one line."""
    with user_errors(), quiet_when_piped():
        options, args = parse(VLMTrainer, words, prog, options=VLMArguments, name="harden-vlm")
        results = harden_vlm(options, args)
        part()
    return Path(args.output_dir), results


def harden_vlm(options: VLMArguments, args: VLMTrainingArguments) -> list[RobustnessResult]:
    """Fine-tune the vision tower of a VLM at what its language model reads, without running or loading that.

    `output_dir` is then the whole VLM in its stock folder, with `harden_report.json`; for the demo also with
    `robustness.json`, the answers under attack before and after.

    Args:
        options: Model, images and measurement.
        args: Training and attack; `feature` must be "language_tokens".

    Returns:
        The results before and after; none where nothing was asked.

    Raises:
        ValueError: If an input is wrong, `output_dir` already holds a run, or the weights of the language model changed.
    """
    start, asked = time.time(), options.measure and options.dataset_name is None
    if options.cpu_threads is not None and args.device.type == "cpu":
        torch.set_num_threads(options.cpu_threads or max(usable_cores() // args.world_size, 1))
    _check_push(args, asked)
    announce(args)
    output, name = Path(args.output_dir), shipped(options.model_name_or_path or "demo-llava")
    reads = (options.model_name_or_path, options.dataset_name)
    resume = check_folder(output, args.resume_from_checkpoint, overwrite=options.overwrite, reads=reads)
    set_seed(args.seed)
    trainer = make_trainer(options, args, name)
    if resume is not None:
        trainer.need_resumable(resume)  # and not after hours of measuring
    original = trainer.reference.encoder  # neither sharded nor with an adapter, as the model that trains may be
    rest = original.origin.rest_sha256(original)
    with run_folder(output, overwrite=options.overwrite and not args.resume_from_checkpoint) as replaced:
        results = ask(name, options, args, "before") if asked else []
        trainer.train(resume_from_checkpoint=resume)
        if original.origin.rest_sha256(original) != rest:  # before it is written into another folder
            raise ValueError(f"weights beside tower and projector changed in {name} during the run; start again.")
        trainer.save_model(str(output))
        trainer.accelerator.wait_for_everyone()
        hardened = load_encoder(output, resolution=options.resolution)
        if hardened.origin.rest_sha256(hardened) != rest:
            raise ValueError(f"the language model in {output} is not the one of {name}: do not use it.")
        report = compare(trainer, hardened, name, rest, options.test_steps)
        after = ask(str(output), options, args, "after") if asked else []
        for result in after:
            result.training = trainer.training_record()
        results += after
        if args.should_save:
            _write(output, report, results, trainer, options)
        trainer.accelerator.wait_for_everyone()
        replaced([HARDEN_REPORT, *(str(result.samples) for result in results)])
    if args.should_save:
        print(f"\n{report}\n", *([comparison_text(results)] if results else []), sep="\n")
        print(f"in {time.time() - start:.0f} s; the whole VLM lies in {output}")
        questions = ["evaluate-vlm", str(output), "--questions", "FILE", "--output_dir", str(output)]
        print(next_steps(*([] if results else [questions]), ["push", str(output), "OWNER/NAME", "--dry_run"]))
    if args.push_to_hub:
        part_and_push(trainer)
    return results


def check_rest(name: str) -> None:
    """Refuse a hardened VLM whose language model is no longer the one that its report names; others pass.

    Raises:
        ValueError: If other weights than those of tower and projector were changed after the hardening.
    """
    report = Path(name) / HARDEN_REPORT
    if not report.is_file():
        return
    encoder = load_encoder(name)
    if encoder.origin.rest_sha256(encoder) != read_json(report.read_text(encoding="utf-8"), report).get("rest_sha256"):
        raise ValueError(
            f"weights beside tower and projector in {name} are not those that its {HARDEN_REPORT} names: it was changed after "
            f"it was hardened. Harden it again, or delete {HARDEN_REPORT} there to measure it as another model."
        )


def make_trainer(options: VLMArguments, args: VLMTrainingArguments, name: str) -> VLMTrainer:
    """The trainer with the tower of a VLM, its images and its processor.

    Raises:
        ValueError: If it is no VLM, or is to be trained at something else than what its language model reads.
    """
    if args.feature != "language_tokens":
        raise ValueError(
            f"a VLM is hardened at what its language model reads; type --feature language_tokens, got {args.feature}."
        )
    with reading(name):
        encoder = load_encoder(name, revision=options.model_revision, resolution=options.resolution)
    if not isinstance(encoder, VLMEncoder):
        raise ValueError(
            f"{name} is no vision-language model; for a CLIP type hf-robust-vision harden sim-clip --vlm NAME."
        )
    encoder.train_projector = options.train_projector
    images = load_images(options, encoder.transform, args.seed)
    return VLMTrainer(model=encoder, args=args, train_dataset=images)  # the processor lies beside the weights


def _check_push(args: VLMTrainingArguments, asked: bool) -> None:
    if not args.push_to_hub:
        return
    check_push(args)
    if not asked:
        raise ValueError(
            "--push_to_hub true publishes measured models only, and this run asks nothing: measure what it leaves, then "
            f"push that: hf-robust-vision evaluate-vlm {args.output_dir} --output_dir {args.output_dir}"
        )


def _write(
    output: Path, report: HardenReport, results: list[RobustnessResult], trainer: VLMTrainer, options: VLMArguments
) -> None:
    report.save(output)
    if not results:
        return
    save_results(results, output)
    describe(
        output,
        results,
        options.model_name_or_path or "demo-llava",
        model_name=f"{report.original.split('/')[-1]}-robust",
        model_class=report.model,
        dataset=options.dataset_name,
        tags=trainer.tag_names,
        paper=trainer.paper,
    )


def load_images(options: VLMArguments, transform: PixelTransform, seed: int) -> LabelledImages | StreamedImages:
    """The images to train on; labels are not looked at.

    Raises:
        ValueError: If there are none, or one can not be decoded.
    """
    if options.dataset_name is None:
        refuse_ignored(options, "dataset_config", "train_split", "image_column", "streaming")
        return load_demo("train", transform)
    source = ImageSource(
        options.dataset_name, options.dataset_config, image_column=options.image_column, label_column=None
    )
    if options.streaming:
        stream = stream_images(source, options.train_split, transform).shuffled(seed)
        return stream.without_corrupt() if options.skip_corrupt else stream
    images = load_labelled_images(source, options.train_split, transform)
    if len(images) > SCAN_LIMIT and not options.skip_corrupt:
        return images
    return without_corrupt(images, skip=options.skip_corrupt)


def ask(name: str, options: VLMArguments, args: VLMTrainingArguments, model: str) -> list[RobustnessResult]:
    """The demo's questions of colour and shape, under attack through the whole VLM."""
    vlm = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).to(args.device).eval()
    how = VLMProtocol(
        tuple(map(float, options.test_eps)),
        steps=options.test_steps,
        restarts=options.test_restarts,
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
    )
    asked: Any = load_questions("test", yes_no=False, limit=options.num_questions)
    task = VQA(vlm, AutoProcessor.from_pretrained(name), asked, options.prompt, DEMO_NAME, "test", "colour/shape")
    if model == "before":
        say_cost(task, how.robustness(), "--num_questions N, or fewer --test_steps", models=2)
    shown = not args.disable_tqdm
    return evaluate(task, how.robustness(), model_name=model, samples_dir=args.output_dir, progress=shown)


def compare(trainer: VLMTrainer, hardened: Any, name: str, rest: str, steps: int) -> HardenReport:
    """Original and hardened VLM by what their language model reads, on the first images that it was trained on."""
    reference, args = trainer.reference, trainer.args
    original = reference.encoder.to(args.device)
    hardened.to(args.device).eval()
    rows = iter(trainer.train_dataset)
    images = torch.stack([item["images"] for item, _ in zip(rows, range(PROBES))]).to(args.device)
    distance = FeatureDistance(
        "language_tokens", variances=token_variances(reference, [{"images": one} for one in images.cpu()])
    )
    batches = torch.arange(len(images)).split(args.train_batch_size)  # what training has room for

    def attacked(encoder: Any) -> float:
        ball, total = make_ball(args.attack_norm, args.attack_eps), 0.0
        with attack_mode(encoder):
            for rows in batches:
                far = partial(_distance_of, encoder, distance, reference(images[rows]))
                found = pgd(far, images[rows], ball, steps=steps, noise=StartNoise(args.seed, rows.tolist(), 0))
                with torch.no_grad():
                    total += float(far(found).sum())
        return total / len(images)

    with torch.no_grad():
        seen = [(hardened(images[rows]).language_tokens, reference(images[rows]).language_tokens) for rows in batches]
        cosine = torch.cat([F.cosine_similarity(*pair, dim=-1) for pair in seen]).mean()
    before, after = original.state_dict(), hardened.state_dict()
    path = Path(name)
    return HardenReport(
        model=hardened.stock_class.__name__,
        original=path.name if path.exists() else name,
        revision=original.origin.revision,
        tower=path_of(hardened, hardened.tower),
        parameters=sum(value.numel() for value in before.values()),
        changed=sum(int((before[key] != after[key].to(before[key])).sum()) for key in before),
        tower_sha256_before=weights_sha256(original.tower),
        tower_sha256_after=weights_sha256(hardened.tower),
        rest_sha256=rest,
        clean_cosine=float(cosine),
        attacked_before=attacked(original),
        attacked_after=attacked(hardened),
        images=len(images),
        training=trainer.training_record(),
        versions=versions(),
    )


def _distance_of(encoder: Any, distance: FeatureDistance, target: EncoderOutput, images: torch.Tensor) -> torch.Tensor:
    return distance(encoder(images), target)
