"""A published robust encoder, read back together with what was measured on it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from hf_robust_vision.evaluation.results import RESULTS_FILE, RobustnessResult, load_results
from hf_robust_vision.towers.adapters import holds_adapter, original_of
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.load import Encoder, load_encoder, merge_adapter
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.weights import local_or_hub

from .card import hardened
from .release import REPLACED, TOWER_RECORD
from .repeat import Repeat, repeat_zero_shot


@dataclass(frozen=True)
class RobustEncoder:
    """An encoder with its record, as `robustness.json` holds it."""

    encoder: Encoder  # a `CLIPVisionEncoder` where only the tower was published
    tokenizer: Any  # None for a tower alone
    results: list[RobustnessResult]
    before: list[RobustnessResult]  # of the original, under the same attacks
    folder: Path

    @property
    def training(self) -> dict[str, Any]:
        """How it was trained: method, attack, steps and the like; empty where that was not recorded."""
        return next((result.training for result in self.results if result.training), {})

    def repeat(
        self, dataset: Any = None, *, max_samples: int | None = None, batch_size: int = 64, device: Any = None
    ) -> Repeat:
        """Measure the model again on its recorded samples, or on `max_samples` of them; see `repeat_zero_shot`.

        `dataset` is what was measured on, where the record does not tell; `device` is where the encoder moves.
        """
        if not isinstance(self.encoder, DualEncoder):
            raise ValueError("a vision tower alone can not be measured zero-shot; load the whole model.")
        if device is not None:
            self.encoder.to(device)
        data: dict[str, Any] = {"dataset": dataset, "max_samples": max_samples, "batch_size": batch_size}
        return repeat_zero_shot(self.encoder, self.tokenizer, self.results, self.folder, **data)


def load_robust_encoder(
    name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> RobustEncoder:
    """Load what `push_robust_encoder` published, or a folder that a recipe wrote.

    An adapter is merged into the model that it names. The weights are compared with the hash in the record. Numbers of
    another model, of another tower, or of an adapter on another original are refused; of the merged weights a
    difference is a warning, because a merge on another kind of processor may round otherwise. An adapter's original is
    read with the token of `hf auth login`, and so is the rest where no `token` is given.

    Raises:
        ValueError: If it can not be read, has no record, or the record belongs to other weights.
    """
    folder = Path(local_or_hub(name_or_path))
    if not folder.is_dir():
        try:
            kept = [*REPLACED, RESULTS_FILE]
            folder = Path(snapshot_download(str(name_or_path), revision=revision, token=token, allow_patterns=kept))
        except (HfHubHTTPError, EntryNotFoundError, OSError) as error:
            reason = f"is neither a folder nor a model of the Hub that can be read: {error}"
            raise ValueError(f"{name_or_path} {reason}") from error
    if not (folder / RESULTS_FILE).is_file():
        raise ValueError(f"{name_or_path} has no {RESULTS_FILE}; load_encoder reads a CLIP without a record.")
    results = load_results(folder)
    after, before = hardened(results), [result for result in results if result.model == "before"]
    recorded = {result.model_sha256 for result in after}
    if holds_adapter(folder):
        base, base_revision = original_of(folder)
        original = load_encoder(base, revision=base_revision)
        # In another precision the same weights have another hash.
        known = {result.model_sha256 for result in before if {a.get("dtype") for a in result.attacks} == {"float32"}}
        if known and weights_sha256(original) not in known:
            raise ValueError(
                f"the adapter of {name_or_path} was trained on another model than {base} is now: the {RESULTS_FILE} "
                "holds its measurement before, and that is of other weights."
            )
        encoder, tokenizer = merge_adapter(folder, base=original).eval(), load_tokenizer(base, revision=base_revision)
        if recorded != {weights_sha256(encoder)}:
            warnings.warn(
                f"the adapter of {name_or_path}, merged into {base}, is not bit for bit what its numbers were measured "
                "on: another kind of processor rounds otherwise, another original is another model; .repeat() tells.",
                stacklevel=2,
            )
    else:
        encoder = load_encoder(folder, dtype="auto")
        tokenizer = load_tokenizer(folder) if isinstance(encoder, DualEncoder) else None
        held, told = weights_sha256(encoder), getattr(encoder.config, TOWER_RECORD, None) or {}
        # A tower alone has another hash than the model that it was cut from, which is what was measured.
        whole = told.get("model") if tokenizer is None and told.get("tower") == held else held
        if recorded != {whole}:
            raise ValueError(
                f"the {RESULTS_FILE} of {name_or_path} was measured on other weights than it holds"
                + (", or its tower does not tell which: push it again." if tokenizer is None else ".")
            )
    return RobustEncoder(encoder, tokenizer, after, before, folder)
