"""One image under attack, and what a model says about it on the way: what the app shows, and the call that repeats it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.decode import decode_image
from hf_robust_vision.data.demo import CLASS_NAMES, shipped
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.evaluation.single import Attempt, Watch, attack_sample
from hf_robust_vision.evaluation.task import Batch, RobustnessProtocol
from hf_robust_vision.evaluation.tasks import VQA, VLMProtocol
from hf_robust_vision.evaluation.tasks.answers import AnswerLoss, say
from hf_robust_vision.evaluation.tasks.vqa import plain
from hf_robust_vision.evaluation.tasks.zero_shot import ZeroShot
from hf_robust_vision.pixels import Fitting
from hf_robust_vision.towers.base import attack_mode
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.load import load_named
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.text_bank import make_text_bank
from hf_robust_vision.towers.vlm import is_vlm
from hf_robust_vision.towers.vlm_inputs import vlm_inputs
from hf_robust_vision.towers.weights import local_or_hub

from .measure import load_model
from .twins import TWINS, load_twin


SHARES = (0.25, 0.5, 0.75, 1.0)  # of the radius asked for: where the confidence is looked at
MOST_TOKENS = 32  # of an answer: a longer one has no single right form to be attacked


@dataclass(frozen=True)
class Opened:
    """A model in memory, with what it reads texts by; nothing changes it, so that many may ask it one after the other."""

    name: str
    model: Any  # a `DualEncoder`, or a stock VLM
    words: Any  # the tokenizer of the one, the processor of the other

    @property
    def answers(self) -> bool:
        """Whether it answers questions; else it chooses among class names."""
        return not isinstance(self.model, DualEncoder)


@dataclass(frozen=True)
class Look:
    """What the model says at one radius."""

    eps: float  # 0 for the clean image
    answer: str
    confidence: float  # the probability, in [0, 1], that it gives to its answer on the clean image
    fell: bool  # the answer is another than on the clean image


@dataclass(frozen=True)
class ImageAttack:
    """What an attack on one image found."""

    model: str
    clean: Tensor  # as the model is shown it, in [0, 1], shape (3, height, width)
    adversarial: Tensor  # the same shape, at most `eps` away in each pixel
    looks: tuple[Look, ...]  # in rising order of eps, the clean image first
    answer_of_file: str  # on the adversarial image rounded to 256 steps, as a PNG holds it
    seconds: float


def attack_image(
    model: str | Opened,
    image: Any,
    text: str | Sequence[str],
    eps: float,
    *,
    steps: int = 20,
    seed: int = 0,
    watch: Watch | None = None,
) -> ImageAttack:
    """Attack one image in Linf balls of a quarter, half, three quarters and all of `eps`, until the answer changes.

    A CLIP is attacked by APGD on cross-entropy, a VLM by PGD on the loss of its answer, then on its margin, through the
    whole model: away from what it says about the clean image.

    Args:
        model: Of `open_model`, or its name.
        image: Path, bytes or PIL image, see `decode_image`.
        text: Class names for a CLIP, a question for a VLM.
        eps: Radius in pixels of [0, 1].
        steps: Of each attack.
        seed: Of the random starts.
        watch: Told about the work that is done, see `attack_sample`; what it raises ends the attack.

    Raises:
        ValueError: If the image can not be read, the text is not what the model takes, or the model is none.
    """
    opened = open_model(model) if isinstance(model, str) else model
    start, radii = time.time(), tuple(share * eps for share in SHARES)
    picture = decode_image(image)
    if opened.answers:
        vlm = VLMProtocol(radii, steps=steps, restarts=1, batch_size=1, seed=seed)
        task: Any = _question(opened, picture, text)
        how = vlm.robustness()
    else:
        how = RobustnessProtocol(get_protocol("apgd-ce", steps=steps), radii, seed=seed)
        task = _choice(opened, picture, text)
    attempts = attack_sample(task, how, watch)
    with torch.no_grad(), attack_mode(task.model):
        looks = tuple(_look(task, attempt, attempts[0]) for attempt in attempts)
        rounded = ((attempts[-1].image * 255).round() / 255)[None]
        (of_file,) = task.judge(_batch(attempts[0]), rounded)
    return ImageAttack(
        opened.name,
        attempts[0].image.cpu(),
        attempts[-1].image.cpu(),
        looks,
        _said(task, of_file.answer),
        time.time() - start,
    )


def open_model(name: str, *, device: str | None = None) -> Opened:
    """Load a CLIP, a SigLIP or a VLM in float32, by folder, Hub id, or the name of a demo model or its hardened twin.

    Raises:
        ValueError: If there is none, or not the whole of one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = local_or_hub(shipped(TWINS.get(name, name)))
    if name in TWINS:
        model = load_twin(name)
    else:
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is neither a model folder nor a model of the Hub that can be read.") from error
        pooled = config.model_type in ("clip", "siglip", "clip_vision_model", "siglip_vision_model")
        model = load_model(folder, device=device)[0] if pooled else load_named(folder)
    if isinstance(model, DualEncoder):
        return Opened(name, model.to(device).eval(), load_tokenizer(folder))
    if not is_vlm(model):
        raise ValueError(f"{name} is a {type(model).__name__}, neither a CLIP nor a vision-language model.")
    return Opened(name, model.to(device), AutoProcessor.from_pretrained(folder))


@dataclass(frozen=True)
class _Question:
    """The only sample of a `VQA`."""

    picture: Tensor
    text: str
    answer: str
    id: int = 0

    def pixels(self, transform: Fitting) -> Tensor:
        """See `Sample`."""
        return transform.fit(self.picture[None])[0]


def _question(opened: Opened, picture: Tensor, text: str | Sequence[str]) -> VQA:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{opened.name} answers questions: wanted one, got {text!r}.")
    inputs = vlm_inputs(opened.model, opened.words)
    images = inputs.fit(picture[None].to(inputs.device))
    prompt = inputs.written("{}").replace("{}", text)
    with torch.no_grad(), attack_mode(opened.model):
        rows = inputs.encode([prompt], (images.shape[-2], images.shape[-1]))
        answer, cut = (say(inputs, rows, images, most)[0] for most in (MOST_TOKENS, MOST_TOKENS + 1))
    if not plain(answer):
        raise ValueError(f"{opened.name} says nothing about this image: ask something else.")
    if answer != cut:
        raise ValueError(
            f"the answer of {opened.name} is longer than {MOST_TOKENS} tokens ({answer[:60]}...): ask for a short one, "
            "such as by 'Answer in one word.'"
        )
    return VQA(opened.model, opened.words, [_Question(picture, text, answer)], "{}", "image", "one")


def _choice(opened: Opened, picture: Tensor, text: str | Sequence[str]) -> ZeroShot:
    names = [text] if isinstance(text, str) else list(text)
    if len(names) < 2 or len({" ".join(name.casefold().split()) for name in names}) < len(names):
        raise ValueError(f"{opened.name} chooses among class names: wanted at least two, each once, got {names}.")
    encoder, demo = opened.model, set(names) <= set(CLASS_NAMES)
    _need_known(opened, names)
    bank = make_text_bank(encoder, opened.words, names, get_templates("demo" if demo else "photo"))
    shown = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())

    def labelled(label: int) -> ZeroShot:
        rows = [{"image": shown, "label": label}]
        return ZeroShot(encoder, bank, LabelledImages(rows, names, encoder.transform, name="image", split="one"))

    with torch.no_grad(), attack_mode(encoder):
        first = labelled(0)
        image = first.load(0)[None].to(first.weight.device)
        return labelled(int(first.scores(Batch((0,), image), image).argmax()))


def _need_known(opened: Opened, names: Sequence[str]) -> None:
    """Refuse a class name with a word that the tokenizer does not know: it would stand for any other such word."""
    unknown = getattr(opened.words, "unk_token_id", None)
    for name in names:
        ids = opened.words(name, add_special_tokens=False)["input_ids"]
        if not ids or (unknown is not None and unknown in ids):
            raise ValueError(f"the tokenizer of {opened.name} does not know {name!r}: name it in other words.")


def _batch(clean: Attempt) -> Batch:
    return Batch((0,), clean.image[None], (clean.verdict,))


def _look(task: Any, attempt: Attempt, clean: Attempt) -> Look:
    return Look(
        attempt.eps, _said(task, attempt.verdict.answer), _confidence(task, attempt, clean), attempt.verdict.lost
    )


def _said(task: Any, answer: int | str) -> str:
    return str(task.bank.class_names[int(answer)]) if isinstance(task, ZeroShot) else str(answer)


def _confidence(task: Any, attempt: Attempt, clean: Attempt) -> float:
    image, batch = attempt.image[None], _batch(clean)
    if isinstance(task, ZeroShot):
        shares = task.scores(batch, image).float().softmax(1)[0]
        return float(shares[task.label(0)])
    answers = task.answers(batch, task.texts(batch))
    return float((-AnswerLoss(answers)(image)).exp())
