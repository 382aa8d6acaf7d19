"""What every tower gives: its features of images, a mode to be attacked in, and the identity of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


@dataclass
class EncoderOutput(ModelOutput):
    """What one forward pass gives a loss; what was not asked for is None. Embeddings are projected, not normalised."""

    image_embeds: Tensor = None  # type: ignore[assignment]  # of the class token, shape (batch, dim)
    patch_tokens: Tensor = None  # type: ignore[assignment]  # of the layer asked for, shape (batch, patches, width)
    text_embeds: Tensor = None  # type: ignore[assignment]  # of the prompts, shape (prompts, dim)
    # What a language model reads: shape (batch, tokens, width); of earlier layers, too, (batch, tokens, layers, width).
    language_tokens: Tensor = None  # type: ignore[assignment]
    deepstack_tokens: Tensor = None  # type: ignore[assignment]


# What a loss may look at: the entries of an `EncoderOutput` that hold it.
FEATURES = {
    "pooled": ("image_embeds",),
    "patch_tokens": ("patch_tokens",),
    "both": ("image_embeds", "patch_tokens"),
    "language_tokens": ("language_tokens", "deepstack_tokens"),
    "language_and_patch_tokens": ("language_tokens", "deepstack_tokens", "patch_tokens"),
}
DEFAULT_TOKEN_LAYER = -2  # the layer that LLaVA reads


@dataclass(frozen=True)
class Reads:
    """What of the network a method's loss reads; that trains, and nothing else.

    Args:
        feature: One of `FEATURES`.
        token_layer: Entry of `hidden_states` that patch tokens come from.
        text: What of the text tower trains: "encoder" (all of it), "projection" or "none".

    Raises:
        ValueError: If there is no such feature.
    """

    feature: str = "pooled"
    token_layer: int = DEFAULT_TOKEN_LAYER
    text: str = "none"

    def __post_init__(self) -> None:
        if self.feature not in FEATURES:
            raise ValueError(f"unknown feature {self.feature!r}; choose one of {', '.join(map(repr, FEATURES))}.")

    def __contains__(self, entry: str) -> bool:
        return entry in FEATURES[self.feature]

    def asked(self) -> dict[str, Any]:
        """What to ask of an encoder's forward pass beside its images."""
        layer = self.token_layer if "patch_tokens" in self else None
        return {"token_layer": layer} | ({"language_tokens": True} if "language_tokens" in self else {})


def freeze_unread(encoder: Any, reads: Reads) -> None:
    """Let gradients flow only to what a loss on these features reaches, in place; `logit_scale` always stays.

    A parameter without a gradient would break DDP, and weight decay would still shrink it. Which have one depends on
    the class, the layer and the feature; a backward pass tells for all of them.

    Raises:
        ValueError: If the encoder does not give these features.
    """
    encoder.requires_grad_(False)
    for part in encoder.trained_parts():
        part.requires_grad_(True)
    read = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    with torch.enable_grad():
        output = encoder(encoder.probe(), **reads.asked())
        looked_at = [output[entry] for entry in FEATURES[reads.feature] if output.get(entry) is not None]
        total = torch.stack([part.float().square().sum() for part in looked_at]).sum()
    gradients = torch.autograd.grad(total, read, allow_unused=True)
    for module, mode in modes.items():
        module.training = mode
    for parameter, gradient in zip(read, gradients):
        parameter.requires_grad_(gradient is not None and (gradient.is_meta or bool(gradient.any())))
    for part in encoder.text_parts(reads.text):
        part.requires_grad_(True)


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients, both restored at the end.

    Under it a forward pass saves less for the backward pass (0.71 of the bytes were measured), and no `param.grad`
    can be touched. The flags of every sub-module are restored one by one.
    """
    training = [module for module in model.modules() if module.training]
    show_shards(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in training:
        module.training = False
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
        show_shards(model)  # or the learner's pass would find the gathered weights as the attack left them: frozen


def show_shards(model: nn.Module) -> None:
    """Make the parameters of a model under FSDP2 its shards, whose flags count, and not what was gathered from them."""
    for module in model.modules():
        if callable(reshard := getattr(module, "reshard", None)):
            reshard()


def weights_sha256(model: nn.Module, *, but: tuple[str, ...] = ()) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights, in the order of their names.

    Args:
        model: What holds the weights.
        but: First parts of the names of those that are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(but):
            continue
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{tensor_sha256(tensor)}".encode())
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
