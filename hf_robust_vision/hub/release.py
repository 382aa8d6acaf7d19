"""What goes to the Hub: chosen file by file and checked, before the first byte is sent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_robust_vision.evaluation.consistency import check_results
from hf_robust_vision.evaluation.results import RESULTS_FILE, RobustnessResult, load_results
from hf_robust_vision.towers.adapters import ADAPTER_FILES, ADAPTER_FOLDER, CONFIG_FILE, WEIGHTS_FILE, holds_adapter
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.clip import CLIPEncoder
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.processors import load_image_processor, load_tokenizer
from hf_robust_vision.towers.records import REPORTS
from hf_robust_vision.towers.vlm import vlm_class

from .card import eval_results, hardened, headline, is_hub_id, set_kind
from .eval_files import EVAL_FOLDER, PREFIX, eval_files
from .usage import KINDS, replace_usage, usage_block


CARD = "README.md"
PICTURE = "robustness.png"
# In the config of a tower alone: its hash, and that of the model that was measured.
TOWER_RECORD = "robust_vision_record"

# Everything else stays at home: checkpoints, optimizer state, and `training_args.bin`, a pickle that can hold a token.
_MODEL = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_PAPERS = (RESULTS_FILE, PICTURE, *REPORTS, "LICENSE*", "NOTICE*")

# Of an earlier push to the same repository; what it held beside them is not ours to delete.
REPLACED = (
    *(*_MODEL, *ADAPTER_FILES, *_PROCESSOR, *_TOKENIZER, PICTURE),
    *("samples-*.jsonl", f"{EVAL_FOLDER}/{PREFIX}*.yaml"),
)


@dataclass(frozen=True)
class Release:
    """What one push uploads."""

    kind: str
    files: Mapping[str, Path | bytes]  # path in the repository -> a local file, or the content; the card is apart
    results: Sequence[RobustnessResult]  # of the hardened model
    card: ModelCard  # without the repository's name; `card_for` puts it in
    base_model: str | None  # Hub id of the original, where it is known

    @property
    def license(self) -> str | None:
        """What the card states."""
        stated: str | None = self.card.data.get("license")
        return stated

    @property
    def headline(self) -> str:
        """The line of numbers that tells it from others."""
        return headline(self.results)

    def card_for(self, repo_id: str) -> bytes:
        """The card whose example loads this repository."""
        family = "Siglip" if "siglip" in (self.card.data.get("tags") or ()) else "CLIP"
        block = usage_block(self.kind, repo_id, self.results[0], self.base_model, family)
        return replace_usage(str(self.card), block).encode()

    def contents(self, repo_id: str) -> dict[str, Path | bytes]:
        """All files with the card, as one repository gets them."""
        return {**self.files, CARD: self.card_for(repo_id)}


def prepare_release(
    folder: str | Path, what: str | None = None, *, base_model: str | None = None, license: str | None = None
) -> Release:
    """Check a folder and choose what of it is uploaded, see `PushSettings`; the folder itself is only read.

    Raises:
        ValueError: If something is missing, leads out of the folder, was not measured, or belongs to other weights.
    """
    folder = Path(folder)
    kind, results, encoder = check_measured(folder, what)
    card = _check_card(folder, results)
    files: dict[str, Path | bytes] = {}
    if kind == "adapter":
        place = _adapter_folder(folder)
        config, base_model = _check_adapter(place, base_model)
        files |= {CONFIG_FILE: config, WEIGHTS_FILE: place / WEIGHTS_FILE}
    else:
        files |= _matching(folder, (*_MODEL, *_PROCESSOR, *_TOKENIZER)) if kind != "tower" else _tower(folder, encoder)
    files |= _matching(folder, _PAPERS) | eval_files(results)
    files |= {str(result.samples): folder / str(result.samples) for result in load_results(folder) if result.samples}
    need_inside(folder, (folder / CARD, *(content for content in files.values() if isinstance(content, Path))))
    base_model = base_model or card.data.get("base_model")
    if base_model is not None and not is_hub_id(str(base_model)):
        raise ValueError(f"base model {base_model!r} is no Hub id; name the original as owner/model (--base_model).")
    set_kind(card.data, kind, base_model)
    card.data["license"] = license or card.data.get("license")
    return Release(kind, files, results, card, base_model)


def check_measured(folder: str | Path, what: str | None = None) -> tuple[str, list[RobustnessResult], Any]:
    """What a folder is pushed as, the results of its hardened model, and that model, but for an adapter, loaded.

    Raises:
        ValueError: If something but the card is missing, was not measured, or belongs to other weights.
    """
    folder = Path(folder)
    kind, results = _kind(folder, what), _check_results(folder)
    if kind == "adapter":
        return kind, results, None
    return kind, results, (_check_vlm if kind == "vlm" else _check_model)(folder, results)


def need_inside(folder: Path, files: Iterable[Path]) -> None:
    """Refuse a link that leads out of a folder: it may lead to what nobody meant to publish."""
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{file} is a link to {file.resolve()}, outside of {folder}; put the file itself there.")


def _kind(folder: Path, what: str | None) -> str:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; save the model first, so that a push that fails can be repeated.")
    if what not in (None, *KINDS):
        raise ValueError(f"what={what!r} is not one of {', '.join(map(repr, KINDS))}.")
    adapter, model = holds_adapter(_adapter_folder(folder)), (folder / "config.json").is_file()
    vlm = vlm_class(folder)
    kind = what or ("adapter" if adapter and not model else "vlm" if vlm else "model")
    if vlm and kind in ("model", "tower"):
        raise ValueError(f"{folder} holds a {vlm}, which is pushed whole; leave out --what {kind}.")
    if not (adapter if kind == "adapter" else model):
        wanted = CONFIG_FILE if kind == "adapter" else "config.json"
        other = "; it holds an adapter: type --what adapter" if adapter else ""
        raise ValueError(f"{folder} has no {wanted}, so there is no {kind} to push{other}.")
    return kind


def _adapter_folder(folder: Path) -> Path:
    """Where the adapter lies: in the folder itself, or beside the merged model that a recipe with `use_peft` leaves."""
    return folder if holds_adapter(folder) else folder / ADAPTER_FOLDER


def _check_results(folder: Path) -> list[RobustnessResult]:
    if not (folder / RESULTS_FILE).is_file():
        measure = "evaluate-vlm" if vlm_class(folder) else "evaluate"
        raise ValueError(
            f"{folder} has no {RESULTS_FILE}: measure the model first, into its own folder (a robust model is published "
            f"with its numbers): hf-robust-vision {measure} {folder} --output_dir {folder}"
        )
    results = load_results(folder)
    after = hardened(results)
    if not after:
        raise ValueError(f"{folder / RESULTS_FILE} holds no result of the hardened model, only of the original.")
    records = check_results(results, folder)
    for result in results:
        if result.samples is not None and result.samples not in records:
            raise ValueError(f"{folder / result.samples} is missing; measure again.")
    return after


def _check_card(folder: Path, results: Sequence[RobustnessResult]) -> ModelCard:
    path = folder / CARD
    advice = f"write it with hf_robust_vision.hub.card.write_card({str(folder)!r}, results, ...)"
    if not path.is_file():
        raise ValueError(f"{folder} has no model card; {advice}.")
    try:
        card = ModelCard.load(path)
        told = {_row(row) for row in card.data.eval_results or []}
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of {path} can not be read ({error}); {advice}.") from error
    missing = [row for row in eval_results(results) if _row(row) not in told]
    if missing:
        raise ValueError(
            f"{path} does not tell what {RESULTS_FILE} holds: {missing[0].metric_name} = {missing[0].metric_value:g} "
            f"is missing; {advice}."
        )
    return card


def _row(row: Any) -> tuple[Any, ...]:
    attacked_by = ("norm", "eps", "severity", "attacks")
    attack = json.dumps({key: (row.metric_args or {}).get(key) for key in attacked_by}, sort_keys=True)
    return row.metric_type, row.metric_value, row.dataset_type, row.dataset_split, attack


def _check_vlm(folder: Path, results: Sequence[RobustnessResult]) -> Any:
    try:
        vlm = AutoModelForImageTextToText.from_pretrained(folder)
        AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no whole VLM with its processor: {error}") from error
    _need_measured(folder, results, weights_sha256(vlm))
    return vlm


def _check_model(folder: Path, results: Sequence[RobustnessResult]) -> DualEncoder:
    if not (folder / "model.safetensors").is_file() and not list(folder.glob("model-*-of-*.safetensors")):
        raise ValueError(f"{folder} has no model.safetensors; write it with save_pretrained.")
    if not _matching(folder, ("tokenizer.json", "vocab.json")):  # transformers would make one up
        raise ValueError(f"{folder} has no tokenizer.json; save the model's CLIPProcessor (or SiglipProcessor) there.")
    encoder = load_encoder(folder, dtype="auto")
    load_tokenizer(folder)
    if not isinstance(encoder, DualEncoder):
        raise ValueError(f"{folder} holds a vision tower alone; push its CLIPModel folder with what='tower'.")
    _need_measured(folder, results, weights_sha256(encoder))
    return encoder


def _need_measured(folder: Path, results: Sequence[RobustnessResult], sha256: str) -> None:
    for result in results:
        if result.model_sha256 != sha256:
            raise ValueError(
                f"{folder / RESULTS_FILE} was measured on other weights ({result.model_sha256[:12]}) than those of the "
                f"folder ({sha256[:12]}); measure these."
            )


def _check_adapter(folder: Path, base_model: str | None) -> tuple[bytes, str]:
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    base = base_model or config.get("base_model_name_or_path")
    if not base or not is_hub_id(base):
        raise ValueError(
            f"the adapter in {folder} names {base!r} as its original, which nobody else has; name it by its Hub id "
            "(--base_model owner/model)."
        )
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
            keys = list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} can not be read: {error}") from error
    if not keys:
        raise ValueError(f"{folder / WEIGHTS_FILE} holds no weights.")
    return (json.dumps(config | {"base_model_name_or_path": base}, indent=2) + "\n").encode(), base


def _tower(folder: Path, encoder: DualEncoder) -> dict[str, Path | bytes]:
    if not isinstance(encoder, CLIPEncoder):
        raise ValueError(
            f"what='tower' is for a CLIPModel; push a {encoder.stock_class.__name__} whole, what='model'."
        )
    with TemporaryDirectory() as place:
        load_image_processor(folder).save_pretrained(place)
        half = encoder.vision_half()
        half.config.update({TOWER_RECORD: {"model": weights_sha256(encoder), "tower": weights_sha256(half)}})
        half.save_pretrained(place)
        return {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}


def _matching(folder: Path, patterns: Sequence[str]) -> dict[str, Path | bytes]:
    return {path.name: path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()}
