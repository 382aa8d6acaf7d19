"""What an update costs, counted in passes of the image tower: the currency in which methods get equal budgets.

One pass takes one image forward through the tower, or its gradient back to the activations, or back to the weights; each
is about the same work. A prompt's passes through the text tower count by the work of that tower over the image tower's.
What a run logs about itself is not counted. A trainer's log counts as it goes (`PassCounter`, without texts); here the
number is known before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from compare_methods import CleanTrainer
from torch.utils.flop_counter import FlopCounterMode

from hf_robust_vision.methods.agft import AGFTTrainer
from hf_robust_vision.methods.fare import FARETrainer
from hf_robust_vision.methods.pmg_aft import PMGAFTTrainer
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.methods.tecoa import TeCoATrainer
from hf_robust_vision.methods.tima import TIMATrainer
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.training.base import AdversarialTrainer
from hf_robust_vision.training.config import AdversarialTrainingArguments


FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 1, 1, 1
ATTACK_STEP = FORWARD + INPUT_GRADIENT
LEARN = FORWARD + INPUT_GRADIENT + WEIGHT_GRADIENT


@dataclass(frozen=True)
class Passes:
    """Of one update: through the image tower for each image, through the text tower for each prompt."""

    image: int
    text: int = 0

    def cost(self, images: int, prompts: int, text_work: float) -> float:
        """In passes of the image tower; `text_work` is that of a prompt over that of an image."""
        return self.image * images + self.text * prompts * text_work


def passes_of(trainer: type[AdversarialTrainer], args: Any) -> Passes:
    """The passes of one update of a method under its arguments.

    Raises:
        ValueError: If the method is not known here, or only a part of a tower trains, whose passes are fewer.
    """
    _need_whole_towers(args)
    attack = ATTACK_STEP * args.attack_steps
    bounded = getattr(args, "clean_drift_bound", None) is not None
    if trainer is CleanTrainer:
        return Passes(LEARN)
    if trainer is TeCoATrainer:
        return Passes(attack + LEARN)
    if trainer is PMGAFTTrainer:  # learns from both views; the original sees the adversarial one
        return Passes(attack + 2 * LEARN + FORWARD)
    if trainer in (AGFTTrainer, FARETrainer):  # the original sees the clean view
        return Passes(attack + (2 if bounded else 1) * LEARN + FORWARD)
    if trainer is SimCLIPTrainer:
        if args.form == "paper":
            bounded = True
        both = bounded or args.form != "frozen"
        return Passes(attack + (2 if both else 1) * LEARN + FORWARD)
    if trainer is TIMATrainer:
        both = bool(args.takd_weight) and args.takd_student == "clean"
        # The attacker reads the texts as they are, the learner anew.
        text = FORWARD + {"encoder": LEARN, "projection": FORWARD, "none": FORWARD}[args.text_params]
        return Passes(attack + (2 if both else 1) * LEARN + FORWARD, text)
    raise ValueError(f"what an update of {trainer.__name__} costs is not counted; add it to passes.py.")


def _need_whole_towers(args: AdversarialTrainingArguments) -> None:
    partial = args.use_peft or args.freeze_blocks or args.trainable_layers != "all" or args.cache_targets_mb
    sees_less = args.attack_token_share < 1 or args.attack_resolution is not None
    if partial or sees_less or args.attack_cheap_until or args.attack_free_step:
        raise ValueError(
            "passes are counted for whole towers and plain attacks: leave out adapters, frozen blocks, cached targets "
            "and what saves passes of the attack."
        )


@torch.no_grad()
def text_work(encoder: DualEncoder, tokenizer: Any, prompts: list[str]) -> float:
    """Work of a prompt's forward pass over that of an image, in floating-point operations."""
    size = encoder.transform.crop or (encoder.transform.resize,) * 2
    image = torch.zeros(1, 3, *size)  # type: ignore[misc]
    tokens = encoder.tokenize(tokenizer, prompts)
    with FlopCounterMode(display=False) as images:
        encoder.encode_images(image)
    with FlopCounterMode(display=False) as texts:
        encoder.encode_prompts(tokens)
    return texts.get_total_flops() / len(prompts) / images.get_total_flops()


def updates_for(budget: float, cost: float) -> int:
    """Updates that a budget of passes pays for, at least one.

    Raises:
        ValueError: If it does not pay for one.
    """
    if budget < cost:
        raise ValueError(f"a budget of {budget:g} passes does not pay for one update, which costs {cost:g}.")
    return round(budget / cost)
