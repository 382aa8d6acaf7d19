"""Zero-shot classifiers from class names and prompt templates."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .base import attack_mode, tensor_sha256, weights_sha256
from .dual import DualEncoder
from .load import as_encoder


_IMAGE_SIDE = ("vision_model.", "visual_projection.")  # weights that a text bank does not depend on
_KEPT = 8  # banks; one of a thousand classes takes 3 MB
_ON_DISK = (
    10_000  # prompts of a bank that is kept on disk, too: a thousand classes in 80 templates take minutes on a CPU
)


@dataclass(frozen=True)
class TextBank:
    """Class embeddings of a zero-shot classifier."""

    embeddings: Tensor  # unit vectors, shape (classes, dim)
    class_names: tuple[str, ...]  # in the order of the labels
    templates: tuple[str, ...]  # prompts that were averaged, with "{}" for the class name
    logit_scale: float  # the model's own frozen `exp(logit_scale)`
    # SigLIP's: the sigmoid of a logit is then the probability of the pair. It is the same for all classes, so that
    # neither the answer, nor a softmax over classes, nor a margin depends on it.
    logit_bias: float = 0.0

    def logits(self, image_embeds: Tensor) -> Tensor:
        """Scaled cosines plus the bias, shape (batch, classes), from image embeddings that need not be normalised."""
        bank = self.embeddings.to(device=image_embeds.device, dtype=image_embeds.dtype)
        return self.logit_scale * F.normalize(image_embeds, dim=-1) @ bank.T + self.logit_bias

    def classify(self, encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Images to logits, given images to embeddings."""
        return lambda images: self.logits(encode(images))

    def need_classes(self, class_names: Sequence[str]) -> None:
        """Refuse labels of other classes than the bank's, or in another order."""
        if tuple(class_names) != self.class_names:
            raise ValueError(
                f"the dataset has classes {list(class_names)[:3]}..., the text bank {list(self.class_names)[:3]}...; "
                "build the bank from dataset.class_names."
            )

    @property
    def template_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of templates and class names: same hash, same classifier text."""
        text = json.dumps([self.templates, self.class_names], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_MADE: dict[tuple[object, ...], TextBank] = {}  # the oldest first


def make_text_bank(
    model: PreTrainedModel,
    tokenizer: Any,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
) -> TextBank:
    """Embed every class name in every template, normalise, average, normalise again.

    A bank of the same text weights, tokens and device is not made again: methods that leave the text tower alone ask for
    one before, during and after training. One of 10,000 prompts or more is kept in Hugging Face's cache (`HF_HOME`) for
    later runs.

    Args:
        model: The CLIP or SigLIP model whose text tower classifies.
        tokenizer: Its tokenizer.
        class_names: At least two; a warning says which stand more than once.
        templates: Each with one "{}" for the class name.
        batch_size: Prompts per forward pass.

    Raises:
        ValueError: If there are fewer than two classes, `check_templates` refuses a template, the tokenizer makes one text
            of two names, or the model gives NaN.
    """
    check_class_names(class_names)
    check_templates(templates)
    prompts = class_prompts(class_names, templates)
    encoder = as_encoder(model)
    batches = [
        encoder.tokenize(tokenizer, prompts[start : start + batch_size])
        for start in range(0, len(prompts), batch_size)
    ]
    _need_told_apart(class_names, len(templates), batches)
    # By content: neither a model's name nor the object tells whether its text tower was trained meanwhile. And by what
    # weights do not tell: activations, adapters, and the token that is read.
    weights, device = weights_sha256(encoder, but=_IMAGE_SIDE), encoder.logit_scale.device
    tower = (weights, str(encoder.text_model), str(encoder.config.text_config), device)
    texts = [tensor_sha256(tensor) for tokens in batches for _, tensor in sorted(tokens.items())]
    key = (*tower, *texts, tuple(class_names), tuple(templates))
    if key not in _MADE:
        while len(_MADE) >= _KEPT:
            del _MADE[next(iter(_MADE))]
        file = _file(key) if len(prompts) >= _ON_DISK else None
        classes = _read(file, len(class_names)) if file is not None else None
        if classes is None:
            classes = _embed(encoder, batches, len(templates))
            if file is not None:
                _write(file, classes)
        scale, bias = encoder.logit_scale.exp().item(), float(getattr(encoder, "logit_bias", torch.zeros(())).item())
        _MADE[key] = TextBank(classes.to(device), tuple(class_names), tuple(templates), scale, bias)
    return _MADE[key]


def _need_told_apart(class_names: Sequence[str], templates: int, batches: Sequence[dict[str, Tensor]]) -> None:
    """Refuse different names of one text: a tokenizer that knows neither word, or cuts both off, writes them alike."""
    texts = [text for tokens in batches for text in _texts(tokens)]
    seen: dict[tuple[Any, ...], str] = {}
    for place, name in enumerate(class_names):
        other = seen.setdefault(tuple(texts[place * templates : (place + 1) * templates]), name)
        # Names that differ in their case are as those that stand twice, of which `check_class_names` warns.
        if other.casefold().split() != name.casefold().split():
            raise ValueError(
                f"the tokenizer makes one text of the classes {other!r} and {name!r}, so that the model can not tell them "
                "apart: it does not know these words, or cuts the prompt off before them. Use names that it knows, "
                "shorter templates, or another model."
            )


def _texts(tokens: Mapping[str, Tensor]) -> list[bytes]:
    """The tokens of each prompt, without what only fills its batch up."""
    ids, mask = tokens["input_ids"], tokens.get("attention_mask")
    if mask is None:
        return [row.numpy().tobytes() for row in ids.cpu()]
    return [row[kept].numpy().tobytes() for row, kept in zip(ids.cpu(), mask.cpu().bool())]


def _embed(encoder: DualEncoder, batches: Sequence[dict[str, Tensor]], templates: int) -> Tensor:
    with torch.no_grad(), attack_mode(encoder):
        classes = class_embeddings(torch.cat([encoder.encode_prompts(tokens) for tokens in batches]), templates)
        scale, bias = encoder.logit_scale.exp(), getattr(encoder, "logit_bias", torch.zeros(()))
    if not all(bool(torch.isfinite(value).all()) for value in (classes, scale, bias)):
        raise ValueError(
            "the text embeddings, logit_scale or logit_bias of the model are not finite: every image would be class 0."
        )
    return classes


def _file(key: tuple[object, ...]) -> Path:
    """Where a bank of this key lies, in Hugging Face's cache; versions of torch may round otherwise."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    digest = hashlib.sha256(repr((key, torch.__version__)).encode()).hexdigest()[:32]
    return home / "hf_robust_vision" / "text_banks" / f"{digest}.safetensors"


def _read(file: Path, classes: int) -> Tensor | None:
    """Class embeddings that were made before; None where there are none, or the file is not whole."""
    try:
        found = load_file(file)["classes"].clone()  # what is loaded is a map of the file
    except (OSError, KeyError, SafetensorError):
        return None
    return found if found.ndim == 2 and len(found) == classes else None


def _write(file: Path, classes: Tensor) -> None:
    # A cache that can not be written costs time only. Under a name of its own first: processes write at once.
    with suppress(OSError, SafetensorError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        save_file({"classes": classes.cpu().contiguous()}, part)
        part.replace(file)


def check_templates(templates: Sequence[str]) -> None:
    """Refuse no template, and one that holds other than exactly one "{}" and no further brace."""
    wrong = [template for template in templates if template.count("{}") != 1 or len(re.findall("[{}]", template)) != 2]
    if wrong or not templates:
        raise ValueError(f'a template needs one "{{}}" for the class name and no other brace, got {wrong[:3]}.')


def class_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class name in every template, all prompts of the first class first."""
    return [template.format(name) for name in class_names for template in templates]


def class_embeddings(text_embeds: Tensor, templates: int) -> Tensor:
    """One unit vector per class from the embeddings of its prompts: normalised, averaged, normalised again.

    `text_embeds` are in the order of `class_prompts`, shape (classes * templates, dim); gradients flow through. The result
    has shape (classes, dim), in float32 at least.
    """
    wide = text_embeds if text_embeds.dtype == torch.float64 else text_embeds.float()
    return F.normalize(F.normalize(wide, dim=-1).view(-1, templates, wide.shape[-1]).mean(1), dim=-1)


def check_class_names(class_names: Sequence[str]) -> None:
    """Refuse fewer than two classes, and warn of names that stand twice.

    "missile" and "sunglasses" do so among ImageNet's names in CLIP_benchmark: their logits are equal up to rounding.
    """
    if len(class_names) < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {list(class_names)}.")
    twice = sorted(name for name, count in Counter(class_names).items() if count > 1)
    if twice:
        _warn_of_twins(tuple(twice))


@lru_cache(maxsize=64)
def _warn_of_twins(twice: tuple[str, ...]) -> None:
    """Once for the same names: every split and every classifier of a run asks."""
    warnings.warn(
        f"class names {list(twice[:5])} stand more than once: text can not tell these classes apart; as a rule the "
        "first of each is answered, and the images of the others count as wrong.",
        stacklevel=2,
    )
