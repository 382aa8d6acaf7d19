"""What a trainer saves, and goes on from: stock folders at the end, checkpoints with a manifest meanwhile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.fingerprint import fingerprint
from hf_robust_vision.towers.adapters import ADAPTER_FOLDER, has_adapter, load_adapter, merged
from hf_robust_vision.towers.load import Encoder
from hf_robust_vision.towers.weights import check_weights

from . import checkpoints
from .checkpoints import Setting, is_checkpoint
from .config import AdversarialTrainingArguments


MORE_STATE = "more_state.safetensors"  # of a checkpoint, where there is any


class ResumableTrainer(Trainer):
    """The part of `Trainer` that writes and reads folders.

    With an adapter a checkpoint holds it alone, and `save_model` writes the stock model with the adapter merged into
    it, and the adapter in a folder of its own beside it.
    """

    method: ClassVar[str]
    args: AdversarialTrainingArguments
    model: Any
    start: Setting  # the model to start from

    def check_health(self) -> None:
        """Raise where the model of this moment is not worth saving; every process must ask."""
        raise NotImplementedError

    def whole_encoder(self) -> Encoder:
        """The network as it trains."""
        return self.accelerator.unwrap_model(self.model)

    def hardened_encoder(self) -> Encoder:
        """The network that `save_model` writes: the model that trains or, with an adapter, a merged copy of it."""
        encoder = self.whole_encoder()
        return merged(encoder) if has_adapter(encoder) else encoder

    def more_state(self) -> dict[str, Tensor]:
        """What beside weights, optimizer and schedule decides how a run goes on; every process must ask."""
        return {}

    def take_more_state(self, state: dict[str, Tensor]) -> None:
        """Go on with what `more_state` gave."""

    def as_measured(self) -> AbstractContextManager[None]:
        """With the weights that are to be measured and saved in the place of those that train, where they differ."""
        return nullcontext()

    def conclude(self) -> None:
        """After the last update: make the model what is to be measured and saved; every process must ask."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` goes on from the last checkpoint that was written to its end."""
        found, state = self.need_resumable(resume_from_checkpoint) if resume_from_checkpoint else (None, None)
        if found is not None and state is not None and self._is_over(state):
            output = self._take_up(found, state)
        else:
            output = super().train(resume_from_checkpoint=found, **kwargs)
        if self.state.global_step == 0:
            raise ValueError("no update was made, so there is nothing to save.")
        self.conclude()
        self.check_health()
        return output

    def need_resumable(self, resume: str | bool) -> tuple[str, TrainerState]:
        """The checkpoint to go on from, True for the last complete one of `output_dir`, and its state.

        A ValueError where there is none, a file of it is missing or damaged, or model, data, method, schedule, batch or
        precision are not those that it was trained with: it would be another run.
        """
        found = checkpoints.resumable_checkpoint(self.args.output_dir if resume is True else str(resume))
        checkpoints.need_settings(found, self._settings())
        state = TrainerState.load_from_json(str(Path(found) / "trainer_state.json"))
        best = state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and (fault := checkpoints.fault_of(best)):
            raise ValueError(f"the best checkpoint so far can not be loaded at the end: {fault}.")
        return found, state

    def _settings(self) -> dict[str, Setting]:
        args, world = self.args, self.args.world_size
        each, steps = args.train_batch_size, args.gradient_accumulation_steps
        # Images and start noise go by sample, so that processes and accumulation share out an update as they like.
        # Of a stream each process, and each of its workers, reads other images.
        shares: Any = each * steps * world
        if isinstance(self.train_dataset, IterableDataset):
            shares = [each, steps, world, args.dataloader_num_workers]
        batch = f"--per_device_train_batch_size {each} --gradient_accumulation_steps {steps} in {world} processes"
        bf16 = self.accelerator.mixed_precision == "bf16"
        # Values, not paths: a job that a cluster starts again finds its files somewhere else.
        tower = {
            name: Setting(value, f"--{name} {str(value).lower() if isinstance(value, bool) else value}")
            for name, value in self.model.settings().items()
        }
        return (
            tower
            | {
                "method": Setting(self.method, f"method {self.method}"),
                "model": self.start,
                "data": _data_setting(self.train_dataset),
                "batch": Setting(shares, batch),
                "precision": Setting(bf16, f"--bf16 {str(bf16).lower()}"),
            }
            | args.run_settings()
        )

    def _is_over(self, state: TrainerState) -> bool:
        wanted = self.args.max_steps if self.args.max_steps > 0 else state.max_steps
        return state.global_step >= wanted > 0

    def _take_up(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """Load a run that had ended: `Trainer` would take one more step before it looks at `max_steps`."""
        self._load_from_checkpoint(checkpoint)
        self._load_more_state(checkpoint)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, float("nan"), {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if has_adapter(self.model):
            load_adapter(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # which loads after it has shared the weights out
            check_weights(self.model.state_dict(), resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # the weights are loaded by now, whatever the launcher
            self._load_more_state(checkpoint)

    def _load_more_state(self, checkpoint: str) -> None:
        wanted = self.more_state()
        if not wanted:
            return
        file = Path(checkpoint) / MORE_STATE
        found = load_file(file) if file.is_file() else {}
        if set(found) != set(wanted):
            lacking = ", ".join(sorted(set(wanted) - set(found))[:3])
            raise ValueError(f"{file} does not hold what this run goes on with ({lacking}); start anew.")
        self.take_more_state(found)

    def _load_best_model(self) -> None:
        if has_adapter(self.model):
            load_adapter(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()
        self._load_more_state(str(self.state.best_model_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is measured, of a run that was interrupted too; a checkpoint holds the weights that train."""
        folder = output_dir if output_dir is not None else str(self.args.output_dir)
        # Here and not in `_save`: under FSDP the weights are gathered in between.
        with nullcontext() if is_checkpoint(folder) else self.as_measured():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        if is_checkpoint(folder):
            # What is not trained need not lie in every checkpoint: of a VLM that would be the language model.
            if self.args.should_save:
                self.model.save_checkpoint(folder, state_dict)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(str(folder))
                torch.save(self.args, folder / "training_args.bin")
        elif not has_adapter(self.model):
            super()._save(str(folder), state_dict)
        elif self.args.should_save:
            # `Trainer` saves whatever `self.model` is, its class, config and processor with it.
            trained, self.model = self.model, self.hardened_encoder()
            try:
                super()._save(str(folder))
            finally:
                self.model = trained
            self.model.save_pretrained(folder / ADAPTER_FOLDER)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_health()  # before anything is written: what is complete is taken for good
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.unmark(folder)  # an earlier run may have left it, and this one may be killed half-way
        self.accelerator.wait_for_everyone()  # or another process might write before the mark is gone
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:  # an old checkpoint may only go once the new one is complete
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        more = self.more_state()
        if self.args.should_save and more:
            save_file(more, folder / MORE_STATE)
        self.accelerator.wait_for_everyone()  # each writes its own state of the random numbers
        if self.args.should_save:
            checkpoints.mark_complete(folder, self._settings())
            checkpoints.rotate(run_dir, limit, best=self.state.best_model_checkpoint)


def _data_setting(dataset: Any) -> Setting:
    """What the images are, wherever they lie: jobs of a cluster copy them to a disk of their own each time."""
    # Class names decide what a label means, ids where an attack starts and which images a batch holds.
    name, split = getattr(dataset, "name", type(dataset).__name__), getattr(dataset, "split", None)
    size = len(dataset) if hasattr(dataset, "__len__") else None
    value: list[Any] = [split, size, getattr(dataset, "class_names", name)]
    if isinstance(dataset, LabelledImages):
        some = dataset.ids[:: max(len(dataset) // 16, 1)]  # the bytes of all would take an epoch
        content = [{"image": _content(dataset.rows[row][dataset.image_column])} for row in some]
        value += [dataset.ids, dataset.labels(), fingerprint(content)]
    sha256 = hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
    return Setting(sha256, f"--dataset_name {name} (split {split}, {size} images, {sha256[:12]})")


def _content(image: Any) -> Any:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image["path"]
    return Path(image).read_bytes() if isinstance(image, str | Path) else image
