"""What a trainer saves and loads where the model holds an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from hf_robust_vision.towers.adapters import ADAPTER_FOLDER, has_adapter, holds_adapter, load_adapter, merged
from hf_robust_vision.towers.clip import Encoder

from .checkpoints import is_checkpoint


class AdapterTrainer(Trainer):
    """`Trainer` for encoders that may hold an adapter.

    A checkpoint then holds the adapter alone. `save_model` writes the stock model with the adapter merged into it, and
    the adapter in a folder of its own beside it.
    """

    model: Any

    def whole_encoder(self) -> Encoder:
        """The network of this moment, as it trains."""
        return self.accelerator.unwrap_model(self.model)

    def hardened_encoder(self) -> Encoder:
        """The network that `save_model` writes: the model that trains or, with an adapter, a merged copy of it."""
        encoder = self.whole_encoder()
        return merged(encoder) if has_adapter(encoder) else encoder

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        if not has_adapter(self.model) or is_checkpoint(folder):
            super()._save(str(folder), state_dict)
        elif self.args.should_save:
            trained, self.model = self.model, self.hardened_encoder()
            try:
                super()._save(str(folder))
            finally:
                self.model = trained
            self.model.save_pretrained(folder / ADAPTER_FOLDER)

    def check_adapter(self, checkpoint: str) -> None:
        """Refuse a checkpoint with an adapter for a model without one, and the reverse.

        Raises:
            ValueError: If one of them holds an adapter and the other does not.
        """
        if holds_adapter(checkpoint) != has_adapter(self.model):
            flag, verb = ("true", "holds") if holds_adapter(checkpoint) else ("false", "does not hold")
            raise ValueError(f"{checkpoint} {verb} an adapter; go on with --use_peft {flag}.")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.check_adapter(resume_from_checkpoint)
        if has_adapter(self.model):
            load_adapter(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if has_adapter(self.model):
            load_adapter(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()
