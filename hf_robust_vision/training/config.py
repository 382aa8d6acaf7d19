"""Arguments that every adversarial trainer adds to `TrainingArguments`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from datetime import timedelta
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from hf_robust_vision.attacks import PROTOCOLS, Ball, check_length, make_ball
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.processes import PATIENCE, need_a_gpu_each

from .checkpoints import Setting
from .layers import which_layers
from .savings import SavingArguments


# The least that a number may be. A NaN is below nothing, so it would pass every comparison that is written by hand.
WHOLE = {
    "max_steps": -1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "attack_steps": 0, "eval_attack_steps": 1, "lora_r": 1, "lora_alpha": 1,
    "freeze_blocks": 0, "global_batch_size": 1, "cache_targets_mb": 0, "carry_starts_mb": 0, "probe_every": 0,
    "attack_resolution": 1,
}  # fmt: skip
REAL = (
    "learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "warmup_steps", "adam_epsilon",
    "lora_dropout", "layer_decay", "ema_decay", "attack_token_share", "attack_cheap_until",
)  # fmt: skip
MAY_CHANGE = (
    "eval_protocol", "eval_attack_steps", "eval_eps", "on_collapse", "matmul_precision", "cache_targets_mb",
    "probe_every", "on_overfitting", "global_batch_size", "attack_compile",
)  # fmt: skip
OPTIMISATION = (
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate", "weight_decay", "max_grad_norm",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "seed", "data_seed", "dataloader_drop_last",
)  # fmt: skip
# Schedules that do not look at the end: such a run may be trained for longer.
ENDLESS = ("constant", "constant_with_warmup", "reduce_lr_on_plateau")


class Radius(float):
    """A float that also reads fractions: `Radius("4/255")`. Command lines and YAML files write eps so."""

    def __new__(cls, value: Any) -> Radius:
        """Read a number or a text such as "4/255" or "0.5"; anything else is a ValueError."""
        if isinstance(value, str):
            top, slash, bottom = value.partition("/")
            try:
                value = float(top) / float(bottom) if slash else float(top)
            except (ValueError, ZeroDivisionError) as error:
                raise ValueError(f"wanted a number or a fraction such as 4/255, got {value!r}.") from error
        return super().__new__(cls, value)


@dataclass
class AdversarialTrainingArguments(SavingArguments):
    """`TrainingArguments` and the attacks of adversarial fine-tuning.

    Listed are the added fields of which there is more to say than their help. Defaults that differ from
    `TrainingArguments`: `learning_rate` 1e-5, `weight_decay` 1e-4, `lr_scheduler_type` "cosine" (FARE's settings),
    `logging_steps` 10, `ddp_timeout` a day, `use_cpu` where there is no accelerator, `run_name` is that of `output_dir`,
    and `remove_unused_columns` is always False, since images, labels and ids all reach the loss. `push_to_hub` pushes
    once, when the run has been measured. `torch_compile` compiles the encoder in place: the learner's pass and the
    attack's run compiled, weights keep their names, and measurements run as they would without it.

    Args:
        eval_eps: One or several; the first is that of `eval_robust_accuracy`, which a best checkpoint is chosen by.
        on_collapse: "stop" ends the run when the embeddings collapse to a point; "record" only logs it.
        use_peft: On the linear layers that would train otherwise; nothing else trains.
        lora_dropout: Off during attacks and evaluation.
        lora_target_modules: By their names, such as `q_proj v_proj`.
        freeze_blocks: Above 0, what lies before the vision tower's blocks does not train either.
        trainable_layers: "first:N" (the vision tower's input and first N blocks) or "last:N" (its last N blocks and what
            comes after them); an adapter goes on these layers alone. A text tower is not concerned.
        ema_decay: Above 0, the model that is measured and saved is an exponential average of the weights, see
            `WeightAverage`; training goes on from the latest ones.
        matmul_precision: "high" (TF32) or "medium" (bfloat16) inside float32 matrix products of a training step, by
            `torch.set_float32_matmul_precision`; measurements always run at the precision that is set outside.
        global_batch_size: Images that an update sees, however many processes there are: each takes its share, in parts of at
            most `per_device_train_batch_size`, and `gradient_accumulation_steps` is set to their number.
        attack_compile: Backend of `torch.compile`, such as "inductor", by which a step of the training attack is compiled as
            one region, see `CompiledStep`; with `torch_compile` the learner's pass is compiled as well.
        cache_targets_mb: MiB of memory of each process for the original's features of clean images, which then are
            computed once a sample; 0 computes them at each step. For data that is the same at every epoch.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})
    ddp_timeout: int = field(
        default=int(PATIENCE.total_seconds()), metadata={"help": "Seconds that processes wait for each other."}
    )
    attack_norm: str = field(default="linf", metadata={"help": "Norm of the perturbation: linf or l2."})
    attack_eps: Radius = field(default=Radius(4 / 255), metadata={"help": "Radius of the perturbation, e.g. 4/255."})
    attack_steps: int = field(default=10, metadata={"help": "Gradient steps of the training attack."})
    attack_step_size: Radius | None = field(
        default=None, metadata={"help": "Step of the training attack; default 2.5 * eps / steps, at most 1.25 * eps."}
    )
    attack_random_start: bool = field(default=True, metadata={"help": "Start at a random point of the ball."})
    eval_protocol: str = field(default="quick", metadata={"help": f"Attack of evaluate(): {', '.join(PROTOCOLS)}."})
    eval_attack_steps: int | None = field(default=None, metadata={"help": "Steps of the attack of evaluate()."})
    eval_eps: list[Radius] | None = field(
        default=None, metadata={"help": "Radii in evaluate(), that of choices first; default attack_eps."}
    )
    templates: str = field(default="photo", metadata={"help": "Prompt templates: a name or a text file."})
    on_collapse: str = field(default="stop", metadata={"help": "stop or record, when the embeddings collapse."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(
        default=16, metadata={"help": "The adapter's output is multiplied by lora_alpha / lora_r."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers that get an adapter; default: all that would train."}
    )
    layer_decay: float = field(default=1.0, metadata={"help": "Learning rate of a block over that of the next."})
    freeze_blocks: int = field(default=0, metadata={"help": "First blocks of the vision tower that do not train."})
    trainable_layers: str = field(
        default="all", metadata={"help": "all, first:N or last:N blocks of the vision tower."}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "Decay of an average of the weights, e.g. 0.999; 0: none."}
    )
    matmul_precision: str = field(default="highest", metadata={"help": "highest, high or medium, in training steps."})
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Images of an update over all processes; the rest follows from it."}
    )
    attack_compile: str | None = field(
        default=None, metadata={"help": "Compile an attack step as one region, by this backend, e.g. inductor."}
    )
    cache_targets_mb: int = field(default=0, metadata={"help": "MiB for the original's features; 0: no cache."})

    def __post_init__(self) -> None:
        self.apply_fast()
        self._check_numbers()
        self._share_out()
        self._join_launcher()
        self.remove_unused_columns = False
        if str(getattr(self, "resume_from_checkpoint", None)).lower() in ("false", ""):  # as YAML and a shell say it
            self.resume_from_checkpoint = None
        # Without a name, trackio would open a second run for what is logged after training.
        self.run_name = getattr(self, "run_name", None) or Path(self.output_dir).absolute().name
        if not self.dataloader_num_workers:
            self.dataloader_persistent_workers = False  # a file may ask for it, and a command line for no workers
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns about it at every epoch
        self._check_radii()
        self.check_savings()
        if self.fp16:
            # Loss scaling covers the learner's backward pass only, not the attack's.
            raise ValueError("fp16=true lets the attack's gradients underflow to zero unseen; type --bf16 true.")
        one_of("eval_protocol", self.eval_protocol, tuple(PROTOCOLS))
        get_templates(self.templates)
        one_of("on_collapse", self.on_collapse, ("stop", "record"))
        one_of("on_overfitting", self.on_overfitting, ("stop", "record"))
        one_of("matmul_precision", self.matmul_precision, ("highest", "high", "medium"))
        if self.attack_compile is not None:
            one_of("attack_compile", self.attack_compile, tuple(torch.compiler.list_backends(())))
        which_layers(self.trainable_layers)
        if self.parallel_mode.value == "not_distributed" and self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs in one process would use nn.DataParallel, which adversarial training does not "
                "support; start one process per GPU: accelerate launch <script>."
            )

    def _check_radii(self) -> None:
        self.attack_eps = Radius(self.attack_eps)
        if self.attack_eps == 0:
            raise ValueError("attack_eps=0 is no attack; use the plain Trainer, or a radius such as 4/255.")
        check_length("--attack_eps", self.attack_eps, self.attack_norm)
        if self.attack_step_size is not None:
            self.attack_step_size = Radius(self.attack_step_size)
            check_length("--attack_step_size", self.attack_step_size, self.attack_norm, zero=False)
        self.attack_ball()
        radii = self.eval_eps if isinstance(self.eval_eps, list | tuple | None) else [self.eval_eps]
        self.eval_eps = [Radius(eps) for eps in radii or ()] or None
        for eps in self.eval_eps or ():
            check_length("--eval_eps", eps, self.attack_norm)

    def _check_numbers(self) -> None:
        for name, least in WHOLE.items():
            need_number(self, name, least, whole=True)
        for name in REAL:
            need_number(self, name)
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs == 0):
            raise ValueError("no update would be made, and the model saved as it was; type --max_steps 1 or more.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout:g}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay:g}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay:g}.")

    def _share_out(self: Any) -> None:
        """Make the global batch of what the processes take at once."""
        # Before the launcher is joined: a configuration of DeepSpeed reads the batch there.
        world, wanted = int(os.environ.get("WORLD_SIZE", 1)), self.global_batch_size
        if wanted is None:
            return
        if wanted % world:
            raise ValueError(
                f"global_batch_size={wanted} can not be shared out over {world} processes; start a number of processes "
                "that divides it."
            )
        each, most = wanted // world, min(self.per_device_train_batch_size, wanted // world)
        fits = next(size for size in range(most, 0, -1) if each % size == 0)
        if 2 * fits <= most:  # a prime share, say: an update in single images
            raise ValueError(
                f"global_batch_size={wanted} is {each} images for each of {world} processes, which parts of at most "
                f"{self.per_device_train_batch_size} can only make as {each // fits} x {fits}; type a "
                f"--per_device_train_batch_size that divides {each}."
            )
        self.per_device_train_batch_size, self.gradient_accumulation_steps = fits, each // fits

    def _join_launcher(self) -> None:
        # Without `use_cpu`, on a machine without accelerators, bf16 is refused, and each process of a launcher runs
        # alone, in the same folder.
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if launched > 1 and not self.use_cpu:
            need_a_gpu_each("--use_cpu true")
        if launched > 1 and self.use_cpu and not dist.is_initialized():
            # Left to transformers, processes on a CPU wait half an hour, whatever `ddp_timeout` says.
            dist.init_process_group(self.ddp_backend or "gloo", timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()
        if launched > self.world_size:
            raise ValueError(
                f"the launcher started {launched} processes, but none can see a GPU of its own and each would train "
                "alone; type --use_cpu true to train on the CPU."
            )

    def tuning_record(self) -> dict[str, Any]:
        """What is not plain tuning of all weights, for results and card."""
        plain = {
            "matmul_precision": "highest", "layer_decay": 1.0, "freeze_blocks": 0, "trainable_layers": "all", "ema_decay": 0.0,
            "fast": False, "attack_token_share": 1.0, "attack_resolution": None, "carry_starts_mb": 0, "attack_free_step": False,
            "attack_cheap_until": 0.0,
        }  # fmt: skip
        record = {name: getattr(self, name) for name, value in plain.items() if getattr(self, name) != value}
        if self.use_peft:
            record |= {name: getattr(self, name) for name in ("lora_r", "lora_alpha", "lora_dropout")}
            record["lora_target_modules"] = self.lora_target_modules or "all"
        return record

    def own_settings(self) -> dict[str, Any]:
        """Value of every field that the method added."""
        shared = {item.name for item in fields(AdversarialTrainingArguments)}
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in shared}

    def run_settings(self) -> dict[str, Setting]:
        """All arguments that decide what is learnt: they may not change where a run goes on."""
        # Of `TrainingArguments` only the named ones: folders, logging or the number of workers teach a model nothing.
        free = {item.name for item in fields(TrainingArguments)} | set(MAY_CHANGE)
        # Ours count unless named in MAY_CHANGE, so that an argument of a new method is never forgotten.
        names = [*(item.name for item in fields(self) if item.name not in free), *OPTIMISATION]
        if getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type) not in ENDLESS:
            names += ["max_steps"] if self.max_steps > 0 else ["max_steps", "num_train_epochs"]
        values = {name: getattr(self, name) for name in names}
        return {name: Setting(value, f"--{name} {_typed(value)}") for name, value in values.items()}

    def attack_ball(self) -> Ball:
        """The set that the training attack may move in."""
        return make_ball(self.attack_norm, self.attack_eps)


def _typed(value: Any) -> str:
    """A value as a command line would have it."""
    if isinstance(value, list | tuple):
        return " ".join(map(_typed, value))
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


def need_number(holder: Any, name: str, least: float = 0, *, whole: bool = False) -> None:
    """Refuse an attribute that is no finite number of at least `least`; None is left alone where it is the default."""
    value = getattr(holder, name)
    if value is None and getattr(type(holder), name) is None:
        return
    # True is 1 in Python, and YAML reads `yes` and `on` as True.
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise ValueError(f"{name} must be a {'whole ' * whole}number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a text that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
