"""transformers' SigLIP as an encoder: `SiglipModel`, which SigLIP 2 of a fixed image size is as well.

It has no class token: its head attends to the patch tokens and gives the pooled embedding, with no projection after it.
Text is read without an attention mask, at the full length that it was trained with; a logit has a bias beside its scale.

Reference:
    SigLIP, https://huggingface.co/papers/2303.15343; SigLIP 2, https://huggingface.co/papers/2502.14786.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import SiglipModel

from hf_robust_vision.pixels import PixelTransform

from .dual import DualEncoder


class SiglipEncoder(DualEncoder, SiglipModel):
    """A `SiglipModel` whose forward pass takes images in [0, 1] and, if asked, tokenized prompts."""

    stock_class = SiglipModel
    class_tokens = 0
    text_inputs = ("input_ids",)
    text_head = "text_model.head"

    @classmethod
    def default_transform(cls, size: int) -> PixelTransform:
        """As `PooledEncoder.default_transform`: the whole image is stretched to a square."""
        return PixelTransform((size, size), None, (0.5,) * 3, (0.5,) * 3)

    def project(self, pooled: Tensor) -> Tensor:
        """As `PooledEncoder.project`: the head has done it."""
        return pooled

    def padding(self) -> dict[str, Any]:
        """As `DualEncoder.padding`."""
        # The last position is pooled, padding or not: a shorter sequence has another embedding.
        return {"padding": "max_length", "max_length": self.config.text_config.max_position_embeddings}

    def tokenize(self, tokenizer: Any, prompts: Sequence[str], device: Any = None) -> dict[str, Tensor]:
        """As `DualEncoder.tokenize`, in lower case."""
        # Trained so. SigLIP's tokenizer sees to it; Gemma's, which is SigLIP 2's for a fixed image size, does not.
        return super().tokenize(tokenizer, [prompt.lower() for prompt in prompts], device)

    def encode_prompts(self, prompts: Mapping[str, Tensor]) -> Tensor:
        """As `DualEncoder.encode_prompts`; a mask among the prompts is not read."""
        return self.text_model(prompts["input_ids"]).pooler_output


def refuse_free_size(model_type: str, name: str) -> None:
    """Refuse SigLIP 2's NaFlex variants, whose model type is "siglip2"; those of a fixed image size are "siglip".

    Raises:
        ValueError: If it is one.
    """
    if model_type.startswith("siglip2"):
        raise ValueError(
            f"{name} is a SigLIP 2 of free image size (NaFlex), which reads patches and a mask of each image's own; take "
            "one of a fixed size, a SiglipModel such as google/siglip2-base-patch16-224."
        )
