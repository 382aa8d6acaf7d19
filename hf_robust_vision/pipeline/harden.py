"""Measure, harden, measure again, write it down: what every recipe and the command line call."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import CLIPProcessor, HfArgumentParser, set_seed

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.configs import find_config
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.evaluation.results import RobustnessResult, pretty_eps, save_results, tracked_metrics
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import ZeroShot, evaluate_zero_shot
from hf_robust_vision.hub.card import write_card
from hf_robust_vision.hub.push import PushError, VerificationError
from hf_robust_vision.processes import announce, part
from hf_robust_vision.report.pictures import plot_curve
from hf_robust_vision.sanity.check import add_sanity, sanity_text
from hf_robust_vision.towers.clip import CLIPEncoder, Encoder, load_encoder, load_image_processor, load_tokenizer
from hf_robust_vision.training.base import AdversarialTrainer
from hf_robust_vision.training.collapse import CollapseError
from hf_robust_vision.training.config import AdversarialTrainingArguments, Radius
from hf_robust_vision.training.publishing import check_push

from .run_data import DataArguments, load_splits
from .run_folder import check_folder, clear


# What a user can mend: shown as one line, not as a traceback.
USER_ERRORS = (ValueError, ModuleNotFoundError, CollapseError, PushError)


@dataclass
class PipelineArguments(DataArguments):
    """What to harden, on which data, and how to measure it; the data are those of `DataArguments`.

    Args:
        model_name_or_path: Folder or Hub id of a CLIP model; by default the demo model.
        model_revision: Branch, tag or commit of the model.
        test_protocol: Attacks of the reported numbers.
        test_steps: Gradient steps of those attacks; by default the protocol's.
        test_queries: Looks at the model of a black-box attack among them; by default the protocol's.
        test_eps: Radii of those attacks.
        test_restarts: Restarts of each attack at `attack_eps`; by default, and at the other radii, the protocol's.
        sanity: Check the reported numbers for gradient masking; the answers go into every result.
        overwrite: Delete what an earlier run left in `output_dir`.
        measure: Measure before and after; with false the recipe only trains.
        cpu_threads: Threads of each process on a CPU. `accelerate launch` sets one; 0 shares the cores out evenly.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub id; default: the demo."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    test_protocol: str = field(default="robustvlm", metadata={"help": "Attacks of the reported numbers."})
    test_steps: int | None = field(default=None, metadata={"help": "Steps of those attacks."})
    test_queries: int | None = field(default=None, metadata={"help": "Queries of its black-box attack."})
    test_eps: list[Radius] = field(
        default_factory=lambda: [Radius("2/255"), Radius("4/255"), Radius("8/255")],
        metadata={"help": "Radii of the reported numbers."},
    )
    test_restarts: int | None = field(default=None, metadata={"help": "Restarts at attack_eps."})
    sanity: bool = field(default=False, metadata={"help": "Check the numbers for gradient masking."})
    overwrite: bool = field(default=False, metadata={"help": "Delete what an earlier run left in output_dir."})
    measure: bool = field(default=True, metadata={"help": "Measure before and after training."})
    cpu_threads: int | None = field(default=None, metadata={"help": "Threads of a process on a CPU; 0: all cores."})

    def __post_init__(self) -> None:
        self.test_eps = [Radius(eps) for eps in self.test_eps]
        get_protocol(self.test_protocol, steps=self.test_steps, restarts=self.test_restarts, queries=self.test_queries)


def parse(
    trainer_class: type[AdversarialTrainer], argv: Sequence[str] | None = None, demo_config: str | None = None
) -> tuple[PipelineArguments, AdversarialTrainingArguments]:
    """Read the command line and, with `--config FILE`, a YAML file of the same names; the command line wins.

    Args:
        trainer_class: Its arguments are read.
        argv: Words of the command line; by default those of the process.
        demo_config: Read where neither a config, a model nor a dataset is named.

    Raises:
        ValueError: If the file holds a name that is no argument.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser((PipelineArguments, trainer_class.args_class), allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of the arguments below, or the name of a shipped one.")
    known, _ = parser.parse_known_args(words)
    config = known.config
    if config is None and known.model_name_or_path is None and known.dataset_name is None:
        config = demo_config
    if config is not None:
        values = yaml.safe_load(find_config(config).read_text(encoding="utf-8"))
        names = {action.dest for action in parser._actions}
        if stray := sorted(set(values) - names):
            raise ValueError(f"{config}: {stray} are no arguments of {trainer_class.__name__}.")
        parser.set_defaults(**{key: _typed(parser, key, value) for key, value in values.items()})
    namespace = parser.parse_args(words)
    del namespace.config
    pipeline, training = parser.parse_dict(vars(namespace), allow_extra_keys=True)
    return cast(PipelineArguments, pipeline), cast(AdversarialTrainingArguments, training)


def run(
    trainer_class: type[AdversarialTrainer], options: PipelineArguments, args: AdversarialTrainingArguments
) -> list[RobustnessResult]:
    """Measure a model, harden it, measure it again, and leave a stock model folder with its numbers.

    Every input is checked before anything is written. Rank 0 writes; all ranks measure. A script that has nothing else to
    do then calls `processes.part`; with `push_to_hub` the processes have parted already.

    Args:
        trainer_class: The method.
        options: Model, data and measurement.
        args: Training and attack.

    Returns:
        The results before and after, as in `robustness.json`.

    Raises:
        ValueError: If an input is wrong or `output_dir` already holds a run.
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
    name = options.model_name_or_path or str(demo_checkpoint())
    try:
        encoder = load_encoder(name, revision=options.model_revision)
    except OSError as error:
        raise ValueError(
            f"{name} is neither a model folder nor a model of the Hub that can be read: {error}"
        ) from error
    if options.measure and not isinstance(encoder, CLIPEncoder):
        raise ValueError(
            f"{name} has no text tower to measure with; name the whole CLIPModel, or type --measure false."
        )
    processor = CLIPProcessor(
        image_processor=load_image_processor(name, revision=options.model_revision),
        tokenizer=load_tokenizer(name, revision=options.model_revision),
    )
    train, validation, test = load_splits(options, args.seed, encoder.transform, measure=options.measure)
    how = RobustnessProtocol(
        get_protocol(options.test_protocol, steps=options.test_steps, queries=options.test_queries),
        tuple(float(eps) for eps in options.test_eps),
        args.attack_norm,
        restarts=() if options.test_restarts is None else ((float(args.attack_eps), options.test_restarts),),
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
    )
    trainer = trainer_class(
        model=encoder, args=args, train_dataset=train, eval_dataset=validation, processing_class=processor
    )
    if options.overwrite and not args.resume_from_checkpoint:
        clear(output)  # only now: neither bad input nor a launcher that is refused may cost the earlier run
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
    if test is not None and args.should_save:
        _write(output, results, trainer, options)
        if options.sanity:
            models = {"before": trainer.reference.encoder, "after": hardened}
            tasks = {name: ZeroShot(model, trainer.text_bank(test, model), test) for name, model in models.items()}
            add_sanity(results, tasks, how)
            print(sanity_text(results))
            _write(output, results, trainer, options)
        print_table(results, seconds=time.time() - start)
    if args.push_to_hub and test is not None:
        _push(trainer, test)
    return results


def _check_push(options: PipelineArguments, args: AdversarialTrainingArguments) -> None:
    if not args.push_to_hub:
        return
    check_push(args)
    if not options.measure:
        raise ValueError("--push_to_hub true publishes measured models only; leave --measure false out.")


def _push(trainer: AdversarialTrainer, test: LabelledImages) -> None:
    """Part; then the first process publishes what was written, and measures some samples of the download again."""
    first = trainer.is_world_process_zero()
    part()
    if not first:
        return
    try:
        print(trainer.push_to_hub(verify=True, dataset=test, device=trainer.args.device))
    except VerificationError as error:  # it is published; what to make of it is for the reader to say
        print(f"warning: {error}", file=sys.stderr)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def print_table(results: Sequence[RobustnessResult], *, seconds: float) -> None:
    """One line per radius: clean and robust accuracy before and after, with 95 % intervals."""
    before = {result.eps: result for result in results if result.model == "before"}
    print(f"\n{results[0].dataset} ({results[0].split}, {results[0].num_samples} images), {results[0].protocol}")
    print(f"{'eps':>8}  {'before':>24}  {'after':>24}")
    after = [result for result in results if result.model == "after"]
    print(f"{'clean':>8}  {_cell(before[after[0].eps], 'clean')}  {_cell(after[0], 'clean')}")
    for result in after:
        print(f"{pretty_eps(result):>8}  {_cell(before[result.eps], 'robust')}  {_cell(result, 'robust')}")
    spent = f"before {before[after[0].eps].seconds:.0f} s, after {after[0].seconds:.0f} s, all {seconds:.0f} s"
    print(f"measured in: {spent}\n")


def _cell(result: RobustnessResult, kind: str) -> str:
    low, high = result.ci95[f"{kind}_accuracy"]
    return f"{100 * getattr(result, f'{kind}_accuracy'):6.1f} % ({100 * low:5.1f} to {100 * high:5.1f})"


def _typed(parser: HfArgumentParser, key: str, value: Any) -> Any:
    """A YAML value as the command line would read it: `1e-5` and `4/255` are texts there."""
    action = next(action for action in parser._actions if action.dest == key)
    if action.type is None or value is None:
        return value
    convert = action.type
    if action.nargs == "+" and not isinstance(value, list):
        value = [value]
    return [convert(item) for item in value] if isinstance(value, list) else convert(value)


def _measure(
    trainer: AdversarialTrainer, encoder: Encoder, test: LabelledImages, how: RobustnessProtocol, model: str
) -> list[RobustnessResult]:
    encoder.to(trainer.args.device)
    bank = trainer.text_bank(test, encoder)
    if trainer.args.should_save and model == "before":
        print(how, flush=True)
    return evaluate_zero_shot(encoder, bank, test, how, model_name=model, samples_dir=trainer.args.output_dir)


def _write(
    output: Path, results: list[RobustnessResult], trainer: AdversarialTrainer, options: PipelineArguments
) -> None:
    save_results(results, output)
    try:
        picture: str | None = plot_curve(results, output / "robustness.png").name
    except ModuleNotFoundError as error:
        print(f"no picture: {error}", file=sys.stderr)
        picture = None
    # A path of this machine means nothing to the reader of a card; a Hub id does.
    name = options.model_name_or_path or "demo-clip"
    base = Path(name).name if Path(name).exists() else name
    data = options.dataset_name
    write_card(
        output,
        results,
        model_name=f"{base.split('/')[-1]}-{trainer.method.lower()}",
        base_model=base,
        dataset=data if data is not None and not Path(data).exists() else None,
        tags=trainer.tag_names,
        picture=picture,
        license="apache-2.0" if options.model_name_or_path is None else None,
        paper=trainer.paper,
    )
