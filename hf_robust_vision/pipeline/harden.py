"""Measure, harden, measure again, write it down: what every recipe and the command line call."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, set_seed

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.demo import shipped
from hf_robust_vision.evaluation.engine import evaluate
from hf_robust_vision.evaluation.results import RobustnessResult, save_results, tracked_metrics
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import ZeroShot
from hf_robust_vision.hub.push import VerificationError
from hf_robust_vision.processes import announce, part, usable_cores
from hf_robust_vision.report.page import write_report
from hf_robust_vision.report.tables import comparison_text, lying
from hf_robust_vision.sanity.check import add_sanity, sanity_text
from hf_robust_vision.terminal import next_steps
from hf_robust_vision.towers.base import FEATURES
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.load import Encoder
from hf_robust_vision.towers.vlm import LanguageReader
from hf_robust_vision.training.base import AdversarialTrainer
from hf_robust_vision.training.config import AdversarialTrainingArguments
from hf_robust_vision.training.publishing import check_push

from .arguments import PipelineArguments
from .card import describe
from .estimate import say_cost
from .measure import DEMO_MODEL, read_model
from .run_data import load_splits
from .run_folder import check_folder, run_folder


def run(
    trainer_class: type[AdversarialTrainer], options: PipelineArguments, args: AdversarialTrainingArguments
) -> list[RobustnessResult]:
    """Measure a model, harden it, measure it again, and leave a stock model folder with its numbers.

    Every input is checked before anything is written. Rank 0 writes; all ranks measure, and get the results before and
    after, as in `robustness.json`. A script that has nothing else to do then calls `processes.part`; with `push_to_hub`
    the processes have parted already.
    """
    start = time.time()
    if options.cpu_threads is not None and args.device.type == "cpu":
        torch.set_num_threads(options.cpu_threads or max(usable_cores() // args.world_size, 1))
    announce(args)
    output = Path(args.output_dir)
    _check_push(options, args)
    reads = (options.model_name_or_path, options.dataset_name)
    resume = check_folder(output, args.resume_from_checkpoint, overwrite=options.overwrite, reads=reads)
    set_seed(args.seed)
    how = _protocol(options, args)
    trainer, test = _trainer(trainer_class, options, args)
    if resume is not None:
        trainer.need_resumable(resume)  # and not after hours of measuring
    # Results are written inside: what fails before brings the earlier run back. Checks and page can be made again, and
    # their failure must not cost the new run.
    with run_folder(output, overwrite=options.overwrite and not args.resume_from_checkpoint) as replaced:
        before = _measure(trainer, trainer.reference.encoder, test, how, "before") if test is not None else []
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(output))
        hardened = trainer.hardened_encoder()
        after = _measure(trainer, hardened, test, how, "after") if test is not None else []
        for result in after:
            result.training = trainer.training_record()
        results = before + after
        if results:
            trainer.log(tracked_metrics(results))
        if results and args.should_save:
            _write(output, results, trainer, options)
        replaced([str(result.samples) for result in results])
    if test is not None and args.should_save:
        if options.sanity:
            models = {"before": trainer.reference.encoder, "after": hardened}
            tasks = {name: ZeroShot(model, trainer.text_bank(test, model), test) for name, model in models.items()}
            add_sanity(results, tasks, how)
            print(sanity_text(results))
            _write(output, results, trainer, options)
        print_table(results, seconds=time.time() - start)
        print(f"model: {output}", lying(output, [str(page) for page in write_report([output], output)]), sep="\n")
        swap = ["swap", "VLM", str(output), "--output_dir", "DIR"]
        print(next_steps(swap, ["push", str(output), "OWNER/NAME", "--dry_run"]))
    elif args.should_save:
        _say_unmeasured(output, hardened, options)
    if args.push_to_hub and test is not None:
        part_and_push(trainer, dataset=test, device=trainer.args.device)
    return results


def _protocol(options: PipelineArguments, args: AdversarialTrainingArguments) -> RobustnessProtocol:
    return RobustnessProtocol(
        get_protocol(options.test_protocol, steps=options.test_steps, queries=options.test_queries),
        tuple(float(eps) for eps in options.test_eps),
        args.attack_norm,
        restarts=() if options.test_restarts is None else ((float(args.attack_eps), options.test_restarts),),
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
    )


def _trainer(
    trainer_class: type[AdversarialTrainer], options: PipelineArguments, args: AdversarialTrainingArguments
) -> tuple[AdversarialTrainer, LabelledImages | None]:
    """The trainer with its model and data, and the test split where there is something to measure."""
    model, revision = options.model_name_or_path or DEMO_MODEL, options.model_revision
    encoder, name = read_model(model, revision=revision)
    if options.measure and not isinstance(encoder, DualEncoder):
        raise ValueError(
            f"{model} has no text tower to measure with; name the whole CLIPModel, or type --measure false."
        )
    _let_read(encoder, options, args)
    processor = AutoProcessor.from_pretrained(name, revision=revision)
    train, validation, test = load_splits(options, args.seed, encoder.transform, measure=options.measure)
    return trainer_class(encoder, args, train, eval_dataset=validation, processing_class=processor), test


def _let_read(encoder: Encoder, options: PipelineArguments, args: AdversarialTrainingArguments) -> None:
    """Give an encoder the VLM that is to read it, where the loss looks at what that reads."""
    looks = "language_tokens" in FEATURES[getattr(args, "feature", "pooled")]
    if options.vlm is not None and looks:
        encoder.read_by(LanguageReader(shipped(options.vlm)))
    elif looks:
        raise ValueError("feature language_tokens is what the language model of a VLM reads: name it, --vlm NAME.")
    elif options.vlm is not None:
        raise ValueError(f"--vlm {options.vlm} would not be looked at; type --feature language_tokens as well.")


def _check_push(options: PipelineArguments, args: AdversarialTrainingArguments) -> None:
    if args.push_to_hub:
        check_push(args)
    if args.push_to_hub and not options.measure:
        raise ValueError("--push_to_hub true publishes measured models only; leave --measure false out.")


def _say_unmeasured(output: Path, hardened: Encoder, options: PipelineArguments) -> None:
    """Where the model lies, and how it is measured; a vision tower alone is measured in a VLM."""
    data = ["--dataset", options.dataset_name] if options.dataset_name else []
    measure = ["evaluate", str(output), *data, "--output_dir", str(output)]
    alone = ["swap", "VLM", str(output), "--output_dir", "DIR"]
    print(f"model: {output}", next_steps(measure if isinstance(hardened, DualEncoder) else alone), sep="\n")


def part_and_push(trainer: AdversarialTrainer, **verified: Any) -> None:
    """Part; then the first process publishes what was written, and checks the download.

    Args:
        trainer: Whose `output_dir` is measured.
        verified: What the check takes: `dataset` and `device`, see `PushSettings`.
    """
    first = trainer.is_world_process_zero()  # asked while there is a process group to ask
    part()  # nobody has to wait for an upload
    if not first:
        return
    try:
        print(trainer.push_to_hub(verify=True, **verified))
    except VerificationError as error:  # it is published; what to make of it is for the reader to say
        print(f"warning: {error}", file=sys.stderr)


def print_table(results: Sequence[RobustnessResult], *, seconds: float) -> None:
    """One line per radius: clean and robust accuracy before and after, with 95 % intervals."""
    print(f"\n{results[0].dataset} ({results[0].split}, {results[0].num_samples} images), {results[0].protocol}")
    print(comparison_text(results))
    before, after = (next(row.seconds for row in results if row.model == model) for model in ("before", "after"))
    print(f"measured in: before {before:.0f} s, after {after:.0f} s, all {seconds:.0f} s\n")


def _measure(
    trainer: AdversarialTrainer, encoder: Encoder, test: LabelledImages, how: RobustnessProtocol, model: str
) -> list[RobustnessResult]:
    encoder.to(trainer.args.device)
    task = ZeroShot(encoder, trainer.text_bank(test, encoder), test)
    if trainer.args.should_save and model == "before":
        say_cost(task, how, "--max_test_samples N", models=2)
    shown = not trainer.args.disable_tqdm
    return evaluate(task, how, model_name=model, samples_dir=trainer.args.output_dir, progress=shown)


def _write(
    output: Path, results: list[RobustnessResult], trainer: AdversarialTrainer, options: PipelineArguments
) -> None:
    save_results(results, output)
    name = options.model_name_or_path or DEMO_MODEL
    describe(
        output,
        results,
        name,
        model_name=f"{Path(name).name}-{trainer.method.lower()}",
        dataset=options.dataset_name,
        tags=trainer.tag_names,
        paper=trainer.paper,
    )
