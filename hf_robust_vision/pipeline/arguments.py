"""The words of a recipe: what to harden, on which data, and how to measure it; from a command line and a YAML file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, cast

from transformers import HfArgumentParser, TrainingArguments

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.configs import find_config, read_yaml
from hf_robust_vision.evaluation.results import eps_text
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.terminal import Defaults, Parser
from hf_robust_vision.training.base import AdversarialTrainer
from hf_robust_vision.training.config import Radius
from hf_robust_vision.training.savings import FAST

from .run_data import DataArguments


# Of the hundreds of arguments that `Trainer` has, what `--help` shows; `--help_all` shows the others.
OFTEN = {
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "max_grad_norm",
    "seed", "bf16", "use_cpu", "eval_strategy", "eval_steps", "save_steps", "logging_steps", "report_to",
    "resume_from_checkpoint", "push_to_hub", "hub_model_id", "dataloader_num_workers",
}  # fmt: skip


@dataclass
class PipelineArguments(DataArguments):
    """What to harden, on which data, and how to measure it."""

    about: ClassVar[str] = "measure, harden, measure again."  # for the help

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id; default: the demo.", "aliases": ["--model"]}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    vlm: str | None = field(default=None, metadata={"help": "VLM that is to read it, for feature language_tokens."})
    test_protocol: str = field(default="robustvlm", metadata={"help": "Attacks of the reported numbers."})
    test_steps: int | None = field(default=None, metadata={"help": "Steps of those attacks; default: the protocol's."})
    test_queries: int | None = field(default=None, metadata={"help": "Queries of its black-box attack."})
    test_eps: list[Radius] = field(
        default_factory=lambda: [Radius("2/255"), Radius("4/255"), Radius("8/255")],
        metadata={"help": "Radii of the reported numbers."},
    )
    test_restarts: int | None = field(
        default=None, metadata={"help": "Restarts at attack_eps; default, and at other radii: the protocol's."}
    )
    sanity: bool = field(default=False, metadata={"help": "Check the numbers for gradient masking."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace an earlier run in output_dir; it comes back if this one fails."}
    )
    measure: bool = field(default=True, metadata={"help": "Measure before and after training."})
    cpu_threads: int | None = field(
        default=None,
        metadata={"help": "Threads of a process on a CPU; a launcher sets 1, and 0 shares out all cores."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.test_eps = [Radius(eps) for eps in self.test_eps]
        budget = {"steps": self.test_steps, "restarts": self.test_restarts, "queries": self.test_queries}
        # Built for its checks alone; the norm is known to the training arguments only, and "l2" has no upper bound.
        RobustnessProtocol(get_protocol(self.test_protocol, **budget), tuple(map(float, self.test_eps)), "l2")
        if self.cpu_threads is not None and self.cpu_threads < 0:
            raise ValueError(f"cpu_threads must be at least 0, which takes all cores, got {self.cpu_threads}.")


class RecipeParser(Parser, HfArgumentParser):
    """Reads the arguments of a run from dataclasses; help is short, `--help_all` is not."""

    def __init__(
        self, trainer_class: type[AdversarialTrainer], prog: str | None = None, options: Any = PipelineArguments
    ) -> None:
        super().__init__(
            (options, trainer_class.args_class),
            prog=prog,
            formatter_class=Defaults,
            usage="%(prog)s [--config FILE] [--NAME VALUE ...]",
            description=f"{trainer_class.method}: {options.about} Without a model, a dataset and a config it runs the "
            "offline demo.",
            epilog="--help_all also lists the arguments that every `Trainer` of transformers has.",
        )
        self.add_argument("--config", help="YAML file of the arguments below, or the name of a shipped one")
        self.add_argument("--help_all", "--help-all", action=_HelpAll, nargs=0, help="show all arguments, and exit")

    def format_help(self, everything: bool = False) -> str:
        """The help, without most of what `Trainer` adds, and radii as they are typed."""
        hidden = set() if everything else {item.name for item in fields(TrainingArguments)} - OFTEN
        for action in self._actions:
            if action.dest in hidden or (not everything and action.option_strings[0].startswith("--no_")):
                action.help = argparse.SUPPRESS
            default = action.default if isinstance(action.default, list) else [action.default]
            if default and all(isinstance(item, Radius) for item in default):
                action.default = " ".join(eps_text(radius, "linf") for radius in default)
        return super().format_help()


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_help(everything=True))
        parser.exit()


def parse(
    trainer_class: type[AdversarialTrainer],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    *,
    options: type = PipelineArguments,
    name: str | None = None,
) -> tuple[Any, Any]:
    """Read the command line and, with `--config FILE`, a YAML file of the same names; the command line wins.

    Where neither a config, a model nor a dataset is named, the shipped demo config of the method is read, such as
    `sim_clip_demo`. Without an `output_dir` the run goes to `outputs/<method>-<data>`; `name` stands for the method.

    Returns:
        What is read into `options`, and the arguments of `trainer_class`.

    Raises:
        ValueError: If the file can not be read, or holds a name that is no argument or a value of another type; or if
            `--fast` is typed beside what it decides.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = name or trainer_class.method.lower()
    parser = RecipeParser(trainer_class, prog, options)
    known = parser.parse_args(words)
    config = known.config
    if config is None and known.model_name_or_path is None and known.dataset_name is None:
        with suppress(ValueError):  # a method of one's own has no demo
            config = find_config(f"{name.replace('-', '_')}_demo")
    values = read_yaml(find_config(config)) if config is not None else {}
    # Backwards: the `--no_x` of a flag that is true by default comes after it, for the same value.
    ours = ("help", "help_all", "config")
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest not in ours}
    if stray := sorted(set(values) - set(actions)):
        raise ValueError(f"{config}: {stray} are no arguments of {trainer_class.__name__}.")
    parser.set_defaults(**{key: _typed(actions[key], value, f"{config}: {key}") for key, value in values.items()})
    namespace = parser.parse_args(words)  # again, over the defaults of the file: so the command line wins
    if namespace.fast and (twice := sorted(_typed_names(parser, words) & FAST.keys())):
        decided = ", ".join(FAST)
        raise ValueError(f"fast decides {decided}; got --{twice[0]} as well: leave it out, or type --fast false.")
    if namespace.disable_tqdm is None:
        namespace.disable_tqdm = not sys.stderr.isatty()  # bars where a person looks
    if namespace.output_dir is None:
        source = namespace.dataset_name or namespace.model_name_or_path or "demo"
        namespace.output_dir = f"outputs/{name}-{Path(source).name}"
    pipeline, training = parser.parse_dict(vars(namespace), allow_extra_keys=True)
    return pipeline, training


def _typed_names(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """Of the arguments that stand on the command line."""
    flags = {word.partition("=")[0] for word in words}
    return {action.dest for action in parser._actions if flags & set(action.option_strings)}


def _typed(action: argparse.Action, value: Any, where: str) -> Any:
    """A YAML value as the command line would read its text: `1e-5` and `4/255` are texts in YAML.

    Of another type it is a ValueError: true is no number, 2.5 no whole one, and a bare `no` no text.
    """
    if value is None and action.default is None:
        return None
    convert = cast(Any, action.type)
    if isinstance(value, list) and action.nargs == "+" and value:
        return [_scalar(convert, item, where) for item in value]
    if isinstance(value, dict | list) and action.dest in STRUCTURED:
        return value
    value = _scalar(convert, value, where)
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{where} must be one of {', '.join(map(str, action.choices))}, got {value!r}.")
    return [value] if action.nargs == "+" else value


# Fields of `TrainingArguments` that are written as a mapping or a list although a command line reads a text.
STRUCTURED = {item.name for item in fields(TrainingArguments) if "dict" in str(item.type) or "list" in str(item.type)}


def _scalar(convert: Any, value: Any, where: str) -> Any:
    wanted = {"string_to_bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
    name = wanted.get(getattr(convert, "__name__", ""), "a value such as 4/255")
    if not isinstance(value, str | int | float | date) or (isinstance(value, bool) and convert is str):
        quoted = f'; write "{value}" in quotes if it is a text' if isinstance(value, bool) else ""
        raise ValueError(f"{where} must be {name}, got {value!r}{quoted}.")
    try:
        return convert(str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{where} must be {name}, got {value!r}.") from error
