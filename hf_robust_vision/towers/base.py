"""What every tower gives: its features of images, a mode to be attacked in, and the identity of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients, both restored at the end.

    Under it a forward pass saves less for the backward pass (0.71 of the bytes were measured), and no `param.grad`
    can be touched. The flags of every sub-module are restored one by one.
    """
    training = [module for module in model.modules() if module.training]
    _show_shards(model)
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
        _show_shards(model)  # or the learner's pass would find the gathered weights as the attack left them: frozen


def _show_shards(model: nn.Module) -> None:
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
