"""Attack steps that look at some patches of an image only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from .base import EncoderOutput
from .dual import PooledEncoder


class TokenShare:
    """Lets a CLIP or SigLIP tower see a part of each image's patch tokens, while it is told which.

    What stands before the patches, a class token, is always seen. A pass then costs about its share of the tokens, and
    the gradient at the pixels of the other patches is zero.

    Deviation: the papers drop tokens of the learner's pass at random, or of the attack by their attention and layer by
    layer; here the attack alone drops them, at random, before the first layer.

    Reference:
        PatchDropout, https://huggingface.co/papers/2208.07220; attacks on fewer tokens: Wu et al. 2022,
        https://huggingface.co/papers/2207.10498.

    Raises:
        ValueError: If the encoder is another kind of tower.
    """

    def __init__(self, encoder: Any):
        if not isinstance(encoder, PooledEncoder):
            raise ValueError(
                f"attack_token_share needs the tower of a CLIP or a SigLIP, got {type(encoder).__name__}; type "
                "--attack_token_share 1."
            )
        self.class_tokens = encoder.class_tokens
        config = getattr(encoder.config, "vision_config", encoder.config)
        self.patches = (config.image_size // config.patch_size) ** 2
        self.kept: Tensor | None = None
        self.others: Tensor | None = None
        # For good, and asleep: hooks that come and go would have the encoder compiled anew at every step.
        encoder.vision_model.embeddings.register_forward_hook(self._drop)
        encoder.register_forward_hook(self._fill)

    @contextmanager
    def keep(self, kept: Tensor, others: Tensor | None = None) -> Iterator[None]:
        """Show these patches only, indices of shape (batch, kept).

        `others` are patch tokens of shape (batch, patches, width); where an output holds patch tokens, those that were
        not computed are taken from them.
        """
        self.kept, self.others = kept, others
        try:
            yield
        finally:
            self.kept = self.others = None

    def in_turns(
        self, objective: Callable[[Tensor], Tensor], places: Tensor, share: float, others: Tensor | None = None
    ) -> InTurns:
        """An objective that sees another part of each image at every call, and after `1 / share` calls has seen it all.

        Args:
            objective: Images in [0, 1] to one loss per image, by this encoder.
            places: Random numbers that order the patches of each image, shape (batch, patches).
            share: Of the patches that a call sees; one of them at least.
            others: See `keep`.
        """
        return InTurns(self, objective, places.argsort(1), max(round(share * self.patches), 1), others)

    def cost(self, share: float) -> float:
        """Share of all tokens that a pass reads."""
        kept = max(round(share * self.patches), 1)
        return (self.class_tokens + kept) / (self.class_tokens + self.patches)

    def _drop(self, module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        if self.kept is None:
            return embedded
        first, patches = embedded[:, : self.class_tokens], embedded[:, self.class_tokens :]
        return torch.cat([first, patches.gather(1, _wide(self.kept, patches))], dim=1)

    def _fill(self, module: nn.Module, inputs: Any, output: EncoderOutput) -> EncoderOutput:
        if self.kept is None or output.patch_tokens is None:
            return output
        if self.others is None:
            raise ValueError("patch tokens of a part of an image need others=..., or what was dropped has no value.")
        seen = output.patch_tokens
        # Where the learner's target lies: there a token has no distance and adds nothing to the gradient.
        output["patch_tokens"] = self.others.to(seen.dtype).scatter(1, _wide(self.kept, seen), seen)
        return output


class InTurns:
    """An objective that sees another part of each image at every call, see `TokenShare.in_turns`."""

    def __init__(
        self,
        share: TokenShare,
        objective: Callable[[Tensor], Tensor],
        order: Tensor,
        size: int,
        others: Tensor | None,
    ):
        self.share, self.objective, self.order, self.others = share, objective, order, others
        self.columns, self.turns = torch.arange(size, device=order.device), count()

    def now(self) -> Callable[[Tensor], Tensor]:
        """What it is at its next call."""
        # In turns, not drawn anew: with two halves no patch would be attacked twice, and none never.
        first = next(self.turns) * len(self.columns)
        share, objective, others = self.share, self.objective, self.others
        kept = self.order[:, (first + self.columns) % share.patches]

        def partial(images: Tensor) -> Tensor:
            with share.keep(kept, others):
                return objective(images)

        return partial

    def __call__(self, images: Tensor) -> Tensor:
        """One loss per image, shape (batch,)."""
        return self.now()(images)


def _wide(kept: Tensor, tokens: Tensor) -> Tensor:
    return kept[..., None].expand(-1, -1, tokens.shape[-1])
