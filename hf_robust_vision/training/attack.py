"""The attack of a training step: where it starts, how much of an image it sees, what it costs, whether it still works."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_robust_vision.attacks import CompiledStep, Objective, StartNoise, pgd, pgd_last
from hf_robust_vision.attacks.pgd import Step, ascend, default_step
from hf_robust_vision.towers.base import FEATURES, Reads
from hf_robust_vision.towers.load import Encoder
from hf_robust_vision.towers.low_resolution import LowResolution
from hf_robust_vision.towers.token_share import TokenShare

from .batch import Batch
from .config import AdversarialTrainingArguments
from .overfitting import PROBE_IMAGES, PROBE_STEPS, check_overfitting
from .passes import PassCounter
from .starts import CarriedStarts


class AttackTrainer(Trainer):
    """The part of `Trainer` that attacks."""

    args: AdversarialTrainingArguments
    passes: PassCounter
    _passes: list[float]  # of the updates since the last log, for one image
    asked: dict[str, Any]  # of an encoder, by the method's loss
    starts: CarriedStarts | None = None
    token_share: TokenShare | None = None
    low_resolution: LowResolution | None = None
    attack_step: Step = staticmethod(ascend)
    _attacked: tuple[Batch, Tensor] | None = None  # the latest batch and its adversarial images

    def prepare_attack(self, encoder: Encoder, reads: Reads) -> None:
        """Set up what the attacks of this run need, before the encoder is compiled."""
        args = self.args
        if args.attack_token_share < 1:
            self.token_share = _token_share(encoder, reads, optional=args.fast)
        if args.attack_resolution is not None:
            if FEATURES[reads.feature] != ("image_embeds",):
                raise ValueError(
                    f"attack_resolution is not for feature {reads.feature}: the tokens of a smaller view lie elsewhere; "
                    "leave it out."
                )
            self.low_resolution = LowResolution(encoder, args.attack_resolution)
        if args.attack_compile is not None:
            self.attack_step = CompiledStep(args.attack_compile)
        if args.carry_starts_mb:
            self.starts = CarriedStarts(args.carry_starts_mb, float(args.attack_eps), self.train_dataset)

    def attack(self, objective: Objective, batch: Batch) -> Tensor:
        """Adversarial images of a batch, the last iterate of PGD from the samples' own random or remembered starts."""
        args, step = self.args, self.state.global_step
        plan = args.attack_plan(step, self.state.max_steps or args.max_steps)
        # By sample and step, so that neither batch, nor process, nor a resume changes where an attack starts.
        fresh = StartNoise(args.seed, batch.ids.tolist(), step)
        noise = fresh if args.attack_random_start else None
        if self.starts is not None:
            noise = self.starts.noise(fresh, random=args.attack_random_start)
        ball = args.attack_ball()
        if plan.steps == 0:
            return batch.images.clone() if noise is None else ball.start(batch.images, noise.draw(batch.images))
        share = 1.0
        if self.token_share is not None and plan.token_share < 1:
            share = self.token_share.cost(plan.token_share)
            places = fresh.uniform((self.token_share.patches,), "tokens", device=batch.images.device)
            others = batch.original.patch_tokens if self.reads_patches else None
            objective = self.token_share.in_turns(objective, places, plan.token_share, others)
        if self.low_resolution is not None and plan.low_resolution:
            share, objective = self.low_resolution.cost, self.low_resolution.of(objective)
        how: dict[str, Any] = {"steps": plan.steps, "step_size": plan.step_size, "noise": noise}
        with self.passes.at(share):
            if args.attack_compile is not None:
                self.passes.add(2 * plan.steps * len(batch.images))  # a forward pass and an input gradient each
            return pgd_last(objective, batch.images, ball, **how, step=self.attack_step)

    @property
    def reads_patches(self) -> bool:
        """Whether the loss looks at patch tokens."""
        return self.asked.get("token_layer") is not None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer` does; its passes are counted, and where the attack ended is remembered."""
        self.passes.start()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._attacked is not None:
            batch, adversarial = self._attacked
            self._passes.append(self.passes.total / len(batch.images))
            if self.starts is not None:
                ended = self._one_more(batch, adversarial)
                self.starts.remember(batch.ids, batch.images, ended, self.accelerator.gather)
        self._attacked = None
        return loss

    def _one_more(self, batch: Batch, adversarial: Tensor) -> Tensor:
        """The adversarial images a step further, along what the learner's backward pass left at them."""
        gradient = adversarial.grad
        if gradient is None:
            return adversarial
        ball, args = self.args.attack_ball(), self.args
        size = args.attack_step_size or default_step(max(args.attack_steps, 1), ball)
        ascent = ball.ascend(gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        return ball.project(adversarial.detach() + size * ascent, batch.images)

    def probe(self, encoder: Encoder, batch: Batch, adversarial: Tensor) -> None:
        """Compare the training attack with a stronger one on some images of the batch; see `check_overfitting`."""
        args, few = self.args, slice(PROBE_IMAGES)
        some = Batch(batch.images[few], batch.labels[few], batch.ids[few], batch.reference)
        objective, ball = self.attack_objective(encoder, some), args.attack_ball()
        noise = StartNoise(args.seed, some.ids.tolist(), self.state.global_step)
        stronger = pgd(objective, some.images, ball, steps=PROBE_STEPS, step_size=ball.eps / 4, noise=noise)
        with torch.no_grad():
            clean, own, probe = (objective(images).sum() for images in (some.images, adversarial[few], stronger))
        # Over all processes, so that all come to one verdict.
        count = torch.full_like(clean, len(some.images))
        own, probe, count = self.accelerator.reduce(torch.stack([own - clean, probe - clean, count])).tolist()
        self.record("attack_share_of_probe", torch.tensor(own / max(probe, 1e-12), device=clean.device))
        hint = "type --attack_random_start true, --attack_steps 3 or more, or a smaller --learning_rate."
        check_overfitting(own / count, probe / count, args.on_overfitting, self.state.global_step, hint)

    def is_probe_step(self) -> bool:
        """Whether this update looks for catastrophic overfitting; the first never does, where no attack may gain."""
        every, step = self.args.probe_every or 0, self.state.global_step
        return every > 0 and step > 0 and step % every == 0

    def attack_objective(self, encoder: Encoder, batch: Batch) -> Objective:
        """What the attacker maximises."""
        raise NotImplementedError

    def record(self, name: str, value: Tensor) -> None:
        """Log the mean of a value."""
        raise NotImplementedError

    def more_state(self) -> dict[str, Tensor]:
        """With the starts that are carried over."""
        return {} if self.starts is None else self.starts.state()

    def take_more_state(self, state: dict[str, Tensor]) -> None:
        """With the starts that are carried over."""
        if self.starts is not None:
            self.starts.take(state)


def _token_share(encoder: Encoder, reads: Reads, *, optional: bool) -> TokenShare | None:
    """What drops tokens of the attack; None where that can not be and is not insisted on."""
    try:
        if any(entry.startswith(("language", "deepstack")) for entry in FEATURES[reads.feature]):
            raise ValueError(
                f"attack_token_share is not for feature {reads.feature}: a projector reads all patches; type "
                "--attack_token_share 1."
            )
        return TokenShare(encoder)
    except ValueError:
        if optional:
            return None
        raise
