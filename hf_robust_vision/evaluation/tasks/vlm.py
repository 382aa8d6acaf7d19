"""What tasks on vision-language models share: prompts, pixels, and attacks on what the model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Required

import torch
from torch import Tensor, nn
from typing_extensions import override

from hf_robust_vision.attacks import Attack, StartNoise
from hf_robust_vision.attacks import Protocol as Attacks
from hf_robust_vision.evaluation.engine import RunSettings, evaluate
from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.evaluation.task import Batch, Level, RobustnessProtocol, Stage, Task
from hf_robust_vision.pixels import GREY, Fitting
from hf_robust_vision.towers.vlm_inputs import VLMInputs, vlm_inputs

from .answers import AnswerTask, answer_task, say


OBJECTIVES = ("nll", "margin")


@dataclass(frozen=True)
class VLMProtocol:
    """How the robustness of what a model says is measured; see `RobustnessProtocol` for what is not explained here.

    Raises:
        ValueError: If there is no such algorithm or objective.
    """

    eps: tuple[float, ...]
    norm: str = "linf"
    steps: int = 50  # gradient steps per restart
    restarts: int = 2  # random starts for each objective
    # "nll" (loss of a text) and "margin" (best other token minus the text's, at its weakest token), run in order on the
    # samples that still stand.
    objectives: tuple[str, ...] = OBJECTIVES
    batch_size: int = 32
    seed: int = 0
    algorithm: str = "pgd"  # or "apgd"

    def __post_init__(self) -> None:
        if self.algorithm not in ("pgd", "apgd"):
            raise ValueError(f"unknown algorithm {self.algorithm!r}; choose one of ['pgd', 'apgd'].")
        strange = [name for name in self.objectives if name not in OBJECTIVES]
        if strange or not self.objectives:
            raise ValueError(f"unknown objectives {strange or self.objectives}; choose among {OBJECTIVES}.")
        self.robustness()

    def robustness(self) -> RobustnessProtocol:
        """The same as attacks in order."""
        own = (self.algorithm, self.steps, self.restarts)
        attacks = [Attack(f"{self.algorithm}-{self.steps}-{name}", own[0], name, *own[1:]) for name in self.objectives]
        protocol = Attacks(f"vlm-{self.algorithm}-{self.steps}", tuple(attacks))
        return RobustnessProtocol(protocol, self.eps, self.norm, batch_size=self.batch_size, seed=self.seed)


class Sample(Protocol):
    """An image with a text that goes into the prompt.

    A sample may have a `fingerprint`, a string that changes with the image's content: records on disk are then only
    used again for the same image. Without it the id has to stand for the image.
    """

    id: int
    text: str

    def pixels(self, transform: Fitting) -> Tensor:
        """The image in [0, 1], passed through `transform.fit`, shape (3, height, width)."""


class VLMSettings(RunSettings, total=False):
    """What every evaluation of a vision-language model takes beside model, processor, samples and protocol."""

    prompt: Required[str]  # with "{}" for a sample's text, if it is to have one, and the processor's image token
    dataset: Required[str]  # what results call the samples, with `split` and `group`
    split: Required[str]
    group: str
    blank: bool  # show a grey image instead (control: what is answerable without looking)


@dataclass
class VLMTask(Task):
    """Base of the tasks on what a model says about an image; see `VLMSettings`.

    The model is a stock one in float32, or in the dtype that it is deployed in; in place of its processor a `VLMInputs`
    will do.

    Raises:
        TypeError: If `processor` is no processor of images and text.
        ValueError: If it treats images in a way that the evaluator does not follow, or the prompt has no image token.
    """

    model: nn.Module
    processor: Any
    samples: Sequence[Any]
    prompt: str
    dataset: str
    split: str
    group: str = "all"
    blank: bool = False
    inputs: VLMInputs = field(init=False)
    loss = "nll"
    stronger = "raise steps and restarts, attack both objectives"

    def __post_init__(self) -> None:
        self.inputs = vlm_inputs(self.model, self.processor)
        self.written = self.inputs.written(self.prompt)
        self.ids = [sample.id for sample in self.samples]

    @property
    @override
    def weight(self) -> Tensor:
        return torch.empty(0, device=self.inputs.device, dtype=self.inputs.dtype)

    @override
    def load(self, place: int) -> Tensor:
        image: Tensor = self.samples[place].pixels(self.inputs)
        return torch.full_like(image, GREY) if self.blank else image

    def prompts(self, places: Sequence[int]) -> list[str]:
        """With each sample's text, as the processor is given them."""
        return [self.written.replace("{}", self.samples[place].text) for place in places]

    def say(self, batch: Batch, images: Tensor, max_new_tokens: int) -> list[str]:
        """What `generate` says about some images, greedily."""
        height, width = images.shape[-2:]
        prompts = self.inputs.encode(self.prompts(batch.places), (height, width))
        return say(self.inputs, prompts, images, max_new_tokens)

    def answers(self, batch: Batch, texts: Sequence[str]) -> AnswerTask:
        """The texts after the prompts, as a function of the images."""
        height, width = batch.images.shape[-2:]
        return answer_task(self.inputs, self.prompts(batch.places), texts, (height, width))

    def starts(self, stage: Stage, batch: Batch, seed: int) -> StartNoise:
        """Each objective begins at points of its own, whatever runs before it."""
        # From the same points a second objective would climb into the same dead ends.
        plain = stage.attack.objective == OBJECTIVES[0]
        ids = [self.ids[place] for place in batch.places]
        return StartNoise(seed, ids if plain else [f"{sample} {stage.attack.objective}" for sample in ids])

    @override
    def identity(self) -> dict[str, Any]:
        tokenizer = self.inputs.tokenizer
        # Two tokenizers of one class may spell a text differently: other tokens are another attack.
        words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else repr(tokenizer)
        samples = [(sample.id, sample.text, getattr(sample, "fingerprint", "")) for sample in self.samples]
        about = {"prompt": self.written, "samples": samples, "blank": self.blank, "starts": "by objective"}
        about |= {"tokenizer": words, "template": getattr(tokenizer, "chat_template", "")}
        return self.inputs.identity() | about

    @property
    @override
    def resolution(self) -> int | str:
        return self.inputs.resolution

    def decoding(self) -> dict[str, Any]:
        """How texts are generated, for a result."""
        chat = {"chat_template": self.written} if self.written != self.prompt else {}
        return {"prompt": self.prompt, "decoding": "greedy"} | chat

    @override
    def fields(self, level: Level) -> dict[str, Any]:
        return {"generation": self.decoding()}

    def texts(self, batch: Batch) -> Sequence[str]:
        """The texts that attacks are about, one a sample."""
        raise NotImplementedError

    def scores(self, batch: Batch, images: Tensor) -> Tensor:
        """Logits at each token of the text, in the precision of the model."""
        return self.answers(batch, self.texts(batch)).logits(images).to(self.inputs.dtype)

    def other_loss(self, steps: int) -> tuple[Attack, str]:
        """The margin of the text's weakest token, by steps that find their own size."""
        return (
            Attack("another loss", "apgd", "margin", steps),
            "APGD on the margin of the text's weakest token, which no scale of the logits changes, must find next to "
            "nothing that the attacks missed. Where it does, they follow the wrong loss, or take steps of the wrong "
            'size: take both objectives, and algorithm="apgd".',
        )


def evaluate_vlm(kind: type[VLMTask], parts: Sequence[Any], how: VLMProtocol, settings: Any) -> list[RobustnessResult]:
    """Measure a task of model, processor and samples; of `settings` the run takes its own, the task the others."""
    run = {key: value for key, value in settings.items() if key in RunSettings.__annotations__}
    own = {key: value for key, value in settings.items() if key not in run}
    return evaluate(kind(*parts, **own), how.robustness(), **run)
