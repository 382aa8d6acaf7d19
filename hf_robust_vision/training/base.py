"""The loop that every method shares: attack the batch without a trace, then learn from what it found."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, get_scheduler
from typing_extensions import Unpack

from hf_robust_vision.attacks import Objective, get_protocol
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot
from hf_robust_vision.pixels import check_images
from hf_robust_vision.towers.adapters import add_adapter, has_adapter
from hf_robust_vision.towers.base import Reads, attack_mode, freeze_unread, weights_sha256
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.load import Encoder, as_encoder, load_encoder
from hf_robust_vision.towers.reference import Reference, TargetCache
from hf_robust_vision.towers.text_bank import TextBank, make_text_bank
from hf_robust_vision.towers.weights import check_weights

from .attack import AttackTrainer
from .average import WeightAverage
from .batch import Batch
from .checkpoints import Setting, complete_checkpoint
from .collapse import check_collapse, mean_pairwise_cosine
from .config import AdversarialTrainingArguments
from .launchers import check_launcher, gathered, is_sharded, make_shardable
from .layers import decay_learning_rates, freeze_first_blocks, learning_rate_scales, train_layers
from .passes import PassCounter
from .progress import put_bar
from .publishing import PublishWhenMeasured
from .resume import ResumableTrainer
from .speed import compile_in_place, matmul_precision
from .streams import StreamTrainer


class TrainerParts(TypedDict, total=False):
    """What `AdversarialTrainer` hands on to `Trainer` as it is; other options of `Trainer` would do nothing here."""

    eval_dataset: LabelledImages | None
    data_collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]
    callbacks: list[TrainerCallback] | None
    optimizers: tuple[Any, Any]


class AdversarialTrainer(AttackTrainer, ResumableTrainer, StreamTrainer, PublishWhenMeasured):
    """`Trainer` for adversarial fine-tuning of CLIP and SigLIP; a method is a subclass with two functions.

    A subclass says what the attacker maximises (`attack_objective`) and what the learner minimises (`robust_loss`).

    Args:
        model: What `as_encoder` takes, or a folder or Hub id of it.
        args: Attack and training settings.
        train_dataset: `LabelledImages` or `StreamedImages`.
        processing_class: Processor of the model: its tokenizer embeds the class names, its image processor
            says how pixels are normalised, and both are saved with the model.
        reference: The original model; by default a frozen copy of `model` or, with `use_peft`, `model` without its
            adapter, which takes no memory of its own.
        parts: `data_collator`, `callbacks` and `optimizers`, as for `Trainer`, and `eval_dataset`, `LabelledImages` for
            `evaluate()`.

    Raises:
        TypeError: At another option of `Trainer`, such as `compute_metrics`.
        ValueError: If the model is broken, no update could be made, or the launcher would break the attack.
    """

    args_class: ClassVar[type[AdversarialTrainingArguments]] = AdversarialTrainingArguments
    method: ClassVar[str] = ""
    tag_names: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str | None] = None
    against_collapse: ClassVar[str] = ""  # what else than a smaller learning rate to type

    args: AdversarialTrainingArguments
    control: Any

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: AdversarialTrainingArguments,
        train_dataset: Any = None,
        *,
        processing_class: Any = None,
        reference: Reference | None = None,
        **parts: Unpack[TrainerParts],
    ):
        if unknown := set(parts) - set(TrainerParts.__annotations__):
            raise TypeError(f"{type(self).__name__} has no use for {', '.join(sorted(unknown))}; leave it out.")
        encoder = (
            load_encoder(model) if isinstance(model, str) else as_encoder(model, _image_processor(processing_class))
        )
        if has_adapter(encoder):
            raise ValueError("the model holds an adapter already; start from the model that it was trained on.")
        check_weights(encoder.state_dict(), "the model to start from")
        _need_updates(train_dataset, args)
        sha256 = weights_sha256(encoder)  # before an adapter joins them: it is the start that a resume compares
        self.start = Setting(sha256, f"--model_name_or_path {encoder.name_or_path} (weights {sha256[:12]})")
        reads = self.reads(args)
        self.asked = reads.asked()
        freeze_unread(encoder, reads)
        freeze_first_blocks(encoder, args.freeze_blocks)
        train_layers(encoder, args.trainable_layers)
        if parts.get("optimizers", (None,))[0] is None:
            _need_optimizer(args, encoder)
        elif args.layer_decay != 1:
            raise ValueError(f"layer_decay={args.layer_decay:g} would not reach an optimizer of your own.")
        # Before the adapter is added, or the original would learn with the model that is compared with it.
        self.passes = PassCounter()
        self.reference = self.passes.watch(reference or Reference(encoder, reads, share_weights=args.use_peft))
        if args.use_peft:
            layers, seed = args.lora_target_modules, args.seed
            add_adapter(encoder, args.lora_r, args.lora_alpha, args.lora_dropout, target_modules=layers, seed=seed)
        self.targets = lambda images, ids: self.reference(images)
        if args.cache_targets_mb:
            self.targets = TargetCache(self.reference, args.cache_targets_mb, train_dataset)
        parts.setdefault("data_collator", collate_images)
        super().__init__(encoder, args, train_dataset=train_dataset, processing_class=processing_class, **parts)
        # Ours is a mean over one batch of an update, which `Trainer` has to divide by the accumulation steps. As a CLIP's
        # forward accepts loss kwargs, it would take it for divided already.
        self.model_accepts_loss_kwargs = False
        put_bar(self)
        average, compiled = args.ema_decay > 0, args.attack_compile is not None
        check_launcher(self.accelerator, adapter=args.use_peft, average=average, compiled=compiled)
        self.average = WeightAverage(args.ema_decay) if args.ema_decay else None
        if self.average is not None:
            self.add_callback(self.average)
        if self.is_fsdp_enabled:
            make_shardable(encoder)
        self.prepare_attack(encoder, reads)
        compile_in_place(encoder, self.accelerator)
        if args.train_batch_size * args.world_size < 2:
            warnings.warn(
                "one image a step has no spread, so that a collapse of the embeddings goes unseen; train with a "
                "per_device_train_batch_size of 2 or more to notice it.",
                stacklevel=2,
            )
        self._measured: dict[str, list[Tensor]] = {}
        self._passes: list[float] = []
        self._last_images: Tensor | None = None
        self._seen, self._seen_at = 0, 0.0

    # What a method says

    @classmethod
    def reads(cls, args: Any) -> Reads:
        """What of the network the loss reads under these arguments; by default the pooled image embedding."""
        return Reads()

    def attack_objective(self, encoder: Encoder, batch: Batch) -> Objective:
        """What the attacker maximises: images to one loss each; `encoder` is in `attack_mode`."""
        raise NotImplementedError(f"{type(self).__name__} must say what its attacker maximises.")

    def robust_loss(self, model: nn.Module, batch: Batch, adversarial: Tensor) -> Tensor:
        """What the learner minimises, a scalar: the mean over this process's images.

        Call `model(...)` itself, as the launcher wrapped it, never a method of the inner module: only that call prepares
        DDP to average gradients, and FSDP2 to gather weights.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what its learner minimises.")

    # The loop

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer` does, with the learning rates of `layer_decay`."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            wrapped = self.model if model is None else model
            decay_learning_rates(optimizer, self.accelerator.unwrap_model(wrapped), self.args.layer_decay)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer` does, at the `matmul_precision` that was asked for."""
        with matmul_precision(self.args.matmul_precision):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Attack the batch, then take the method's loss on what the attack found."""
        images = check_images(inputs["images"])  # a collator of one's own may have normalised them
        # Two ways into one network. The attack goes around DDP's wrapper: a backward pass through that would average
        # gradients over the processes at every attack step. The loss goes through it, or gradients would not be
        # averaged at all, and nothing would say so.
        encoder = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            batch = Batch(images, inputs["labels"], inputs["ids"], self.targets)
            # Dropout and a gradient to the weights would make the attack weaker and dearer: it would chase another
            # network at every step. The loss below is taken in the mode that `Trainer` set.
            with attack_mode(encoder):
                objective = self.attack_objective(self.passes.watch(encoder), batch)
                adversarial = self.attack(objective, batch)
                with self.passes.paused():
                    if self._is_logging_step():
                        self._monitor(encoder, batch, objective, adversarial)
                    if self.is_probe_step():
                        self.probe(encoder, batch, adversarial)
            # For its backward pass to leave there what a step more needs.
            adversarial.requires_grad_(self.args.attack_free_step)
            loss = self.robust_loss(self.passes.watch(model), batch, adversarial)
        self._seen += len(images) * self.args.world_size
        self._last_images, self._attacked = images, (batch, adversarial)
        return (loss, None) if return_outputs else loss

    # What is logged

    def record(self, name: str, value: Tensor) -> None:
        """Log the mean of `value` over the steps and processes since the last log."""
        self._measured.setdefault(name, []).append(value.detach().float().mean())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add drift, collapse, attack gain and speed to the training log."""
        # `Trainer` logs the loss on every process at the same steps, so that all of them come to this `reduce`.
        if "loss" in logs and self._measured:
            self.record("passes", torch.tensor(self._passes, device=self.args.device))
            means = {name: torch.stack(values).mean() for name, values in self._measured.items()}
            reduced = self.accelerator.reduce(means, reduction="mean")
            logs |= {name: round(value.item(), 6) for name, value in reduced.items()}
            # `start_time` is that of training: a measurement may lie between the construction and it.
            now, since = time.time(), max(self._seen_at, start_time or 0.0)
            logs["samples_per_second"] = round(self._seen / max(now - since, 1e-9), 1)
            self._measured, self._passes, self._seen, self._seen_at = {}, [], 0, now
        super().log(logs, start_time)

    def _is_logging_step(self) -> bool:
        # Monitoring costs three forward passes. With accumulation each part of such an update is measured.
        every = self.state.logging_steps or int(self.args.logging_steps)  # the state resolves a fraction to steps
        return self.state.global_step % max(every, 1) == 0

    @torch.no_grad()
    def _monitor(self, encoder: Encoder, batch: Batch, objective: Objective, adversarial: Tensor) -> None:
        """Measure, on this batch, how strong the attack is and how far the encoder went from the original."""
        clean, original = encoder(batch.images, **self.asked).image_embeds, batch.original.image_embeds
        self.record("cosine_to_original", F.cosine_similarity(clean, original))
        self.record("attack_loss", reached := objective(adversarial))
        self.record("attack_gain", reached - objective(batch.images))
        self.record("pairwise_cosine", self._check_spread(clean, original))

    def _check_spread(self, embeds: Tensor, original: Tensor) -> Tensor:
        """Mean cosine between different images of a step; a run that has collapsed is stopped."""
        # The loss can not tell: where all images have one embedding, a Siamese loss is at its best. Over the images of
        # all processes, so that all come to one verdict: if one stopped alone, the others would wait for it.
        spread, before = (mean_pairwise_cosine(of, self.accelerator.reduce) for of in (embeds, original))
        hint = self._way_out(self.against_collapse)
        check_collapse(float(spread), float(before), self.args.on_collapse, self.state.global_step, hint)
        return spread

    def check_health(self) -> None:
        """Stop a run whose weights are not finite, or whose embeddings collapsed in its last batch."""
        shares = [getattr(value, "to_local", lambda v=value: v)() for value in self.model.parameters()]  # FSDP2's
        broken = any(not value.isfinite().all() for value in shares)
        # What one process has, all must see, or the others would wait for it.
        if float(self.accelerator.reduce(shares[0].new_tensor(broken, dtype=torch.float32))):
            hint = self._way_out("--max_grad_norm 1 or ")
            raise ValueError(f"the weights are not finite after step {self.state.global_step}; {hint}")
        if self._last_images is not None:
            with torch.no_grad(), attack_mode(encoder := self.accelerator.unwrap_model(self.model)):
                embeds = encoder(self._last_images, **self.asked).image_embeds
                original = self.reference(self._last_images).image_embeds
            self._check_spread(embeds, original)

    def more_state(self) -> dict[str, Tensor]:
        """The average of the weights, where there is one."""
        return super().more_state() | ({} if self.average is None else self.average.state(self.model))

    def take_more_state(self, state: dict[str, Tensor]) -> None:
        """The average of the weights, where there is one."""
        super().take_more_state(state)
        if self.average is not None:
            self.average.take(self.model, state)

    def as_measured(self) -> AbstractContextManager[None]:
        """With the average of the weights, where there is one."""
        return super().as_measured() if self.average is None else self.average.put_in()

    def conclude(self) -> None:
        """What was trained is now the average of the weights, where there is one."""
        if self.average is not None:
            self.average.settle()

    def _way_out(self, typed: str) -> str:
        last = complete_checkpoint(self.args.output_dir)
        return f"type {typed}a smaller --learning_rate. Last good checkpoint: {last}."

    # Measuring

    def whole_encoder(self) -> Encoder:
        """The model that trains or, where its weights are shared out, a gathered copy."""
        encoder = super().whole_encoder()
        return gathered(encoder, self.reference.encoder) if is_sharded(encoder) else encoder

    def text_bank(self, dataset: LabelledImages, encoder: Encoder | None = None) -> TextBank:
        """The zero-shot classifier of a dataset's classes, from the text tower of the model or of another encoder."""
        encoder = encoder if encoder is not None else self.whole_encoder()
        tokenizer = getattr(self.processing_class, "tokenizer", None)
        if not isinstance(encoder, DualEncoder) or tokenizer is None:
            raise ValueError(
                "zero-shot evaluation needs a CLIPModel or SiglipModel and its processor as processing_class; a vision tower alone has "
                "no text. Pass eval_dataset=None and eval_strategy='no', or the whole model."
            )
        return make_text_bank(encoder, tokenizer, dataset.class_names, get_templates(self.args.templates))

    def evaluate(
        self,
        eval_dataset: LabelledImages | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Clean and robust accuracy over the whole validation split, shared out over the processes.

        With `ema_decay` they are those of the average of the weights.

        Returns:
            `<prefix>_clean_accuracy` and `<prefix>_robust_accuracy` as fractions, `<prefix>_runtime` in seconds. With
            several `eval_eps` the robust accuracy is that of the first, and each has its own, such as
            `<prefix>_robust_accuracy_4_255`.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("evaluate() needs eval_dataset=LabelledImages, here or in the constructor.")
        protocol = get_protocol(self.args.eval_protocol, steps=self.args.eval_attack_steps)
        radii = tuple(float(eps) for eps in self.args.eval_eps or [self.args.attack_eps])
        size, seed = self.args.eval_batch_size, self.args.seed
        how = RobustnessProtocol(protocol, radii, self.args.attack_norm, batch_size=size, seed=seed)
        with self.as_measured():
            encoder = self.whole_encoder()
            bank, name = self.text_bank(dataset, encoder), f"step {self.state.global_step}"
            where: Any = {"device": self.args.device, "progress": not self.args.disable_tqdm}
            results = evaluate_zero_shot(encoder, bank, dataset, how, model_name=name, **where)
        named = {"clean_accuracy": results[0].clean_accuracy}
        named["robust_accuracy"] = next(result.robust_accuracy for result in results if result.eps == radii[0])
        named |= {result.robust_name: result.robust_accuracy for result in results if len(results) > 1}
        named["runtime"] = round(results[0].seconds, 2)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in named.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def training_record(self) -> dict[str, Any]:
        """How this model was trained, for results and card."""
        args = self.args
        same = ("attack_steps", "attack_step_size", "learning_rate", "weight_decay", "max_grad_norm", "seed")
        record = {
            "method": self.method,
            "norm": args.attack_norm,
            "eps": float(args.attack_eps),
            "steps": self.state.global_step,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "world_size": args.world_size,
            "precision": "bf16" if self.accelerator.mixed_precision == "bf16" else "float32",
        }
        return (
            record
            | {name: getattr(args, name) for name in same}
            | args.tuning_record()
            | args.own_settings()
            | self.model.settings()
        )


def _need_updates(dataset: Any, args: AdversarialTrainingArguments) -> None:
    """Refuse a training set from which no batch can be made."""
    images = len(dataset) if hasattr(dataset, "__len__") else None
    least = args.train_batch_size * args.world_size if args.dataloader_drop_last else 1
    if images is not None and images < least:
        raise ValueError(
            f"no update would be made: the training set has {images} images, and --dataloader_drop_last true drops a "
            f"batch of fewer than {least}; type a smaller --per_device_train_batch_size."
        )


def _need_optimizer(args: AdversarialTrainingArguments, encoder: Encoder) -> None:
    """Refuse an optimizer or a schedule that can not be made, which `Trainer` would notice at the first step only."""
    if args.layer_decay != 1:
        learning_rate_scales(encoder, args.layer_decay)
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, encoder)
        probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
        get_scheduler(args.lr_scheduler_type, probe, 0, 1, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (ImportError, TypeError, ValueError) as error:
        optim, schedule = (getattr(args, name).value for name in ("optim", "lr_scheduler_type"))
        raise ValueError(f"--optim {optim} with --lr_scheduler_type {schedule}: {error}") from error


def _image_processor(processing_class: Any) -> Any:
    """The image processor of a processing class, or None where that is a tokenizer alone."""
    processor = getattr(processing_class, "image_processor", processing_class)
    return processor if hasattr(processor, "image_mean") else None
