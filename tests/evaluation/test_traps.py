"""Traps that users of other attack libraries fell into, each at the door where an evaluation starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.captions import CaptionedImages
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks import VLMProtocol, evaluate_captions, evaluate_targeted, evaluate_vqa
from hf_robust_vision.evaluation.tasks.captions import CaptionMetric
from hf_robust_vision.evaluation.tasks.corruptions import evaluate_corruptions
from hf_robust_vision.evaluation.tasks.retrieval import RetrievalProtocol, evaluate_retrieval
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.sanity.check import check_sanity
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.text_bank import make_text_bank
from tests.conftest import SIZE, TEMPLATE, build_processor, picture
from tests.towers.tiny_processors import PROMPT, Asked, make_processor, make_speaker


FIVE = ("red", "green", "blue", "white", "photo")
FULL = get_protocol("autoattack", steps=2, queries=3)


class Normalised(LabelledImages):
    """What a processor with `do_normalize=True` hands on."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"images": PixelTransform(SIZE, None).normalize(item["images"][None])[0]}


def evaluate(encoder, bank, dataset, how):
    return evaluate_zero_shot(encoder, bank, dataset, how, model_name="before", progress=False)


def corrupted(encoder, bank, dataset, how):
    pytest.importorskip("imagecorruptions")
    return evaluate_corruptions(
        encoder, bank, dataset, model_name="before", families=("contrast",), severities=(1,), progress=False
    )


@pytest.mark.parametrize("door", [evaluate, check_sanity, corrupted], ids=lambda door: door.__name__)
def test_normalised_images_are_refused_with_their_range(door, encoder, bank, dataset):
    other = Normalised(dataset.rows[:4], dataset.class_names, dataset.transform, name="tiny", split="test")
    values = torch.stack([other[index]["images"] for index in range(4)])
    with pytest.raises(ValueError, match=rf"from {values.min():.4g} to {values.max():.4g}.*do_normalize=False"):
        door(encoder, bank, other, RobustnessProtocol(get_protocol("quick", steps=1), (1 / 255,)))


RANGE = r"from -\d\S* to [12]\.\d+.*do_normalize=False"


class NormalisedCaptions(CaptionedImages):
    """The same, of a gallery."""

    def image(self, place):
        return PixelTransform(SIZE, None).normalize(super().image(place)[None])[0]


@dataclass(frozen=True)
class NormalisedSample(Asked):
    """The same, of what a VLM is asked."""

    def pixels(self, transform):
        return PixelTransform(SIZE, None).normalize(super().pixels(transform)[None])[0]


def test_normalised_images_are_refused_for_retrieval(encoder, tmp_path):
    rows = [{"image": picture(i, i), "captions": name} for i, name in enumerate(("red", "green", "blue"))]
    gallery = NormalisedCaptions(rows, PixelTransform(SIZE, (SIZE, SIZE)), name="tiny", split="test")
    settings = {"model_name": "before", "progress": False, "samples_dir": tmp_path}
    how = RetrievalProtocol((1 / 255,), steps=1, ks=(1,))
    with pytest.raises(ValueError, match=RANGE):
        evaluate_retrieval(encoder, build_processor().tokenizer, gallery, how, **settings)
    assert not [file for file in tmp_path.glob("samples-*") if file.read_text()]


@pytest.mark.parametrize(
    "door",
    [
        evaluate_vqa,
        partial(evaluate_captions, metric=CaptionMetric("overlap", lambda said, references: 0.0)),
        partial(evaluate_targeted, target="w9"),
    ],
    ids=["vqa", "captions", "targeted"],
)
def test_normalised_images_are_refused_by_a_vlm(door, tmp_path):
    vlm, processor = make_speaker("llava"), make_processor("llava")
    about = {"prompt": PROMPT, "model_name": "before", "dataset": "tiny", "split": "test", "progress": False}
    how = VLMProtocol((1 / 255,), steps=1)
    with pytest.raises(ValueError, match=RANGE):
        door(vlm, processor, [NormalisedSample(0)], how=how, samples_dir=tmp_path, **about)
    assert not [file for file in tmp_path.glob("samples-*") if file.read_text()]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_full_suite_runs_with_few_classes(encoder, classes, norm):
    names = FIVE[:classes]
    few = make_text_bank(encoder, build_processor().tokenizer, names, TEMPLATE)
    rows = [{"image": picture(i, i % 3), "label": i % classes} for i in range(10)]
    dataset = LabelledImages(rows, names, PixelTransform(SIZE, (SIZE, SIZE)), name="tiny", split="test")
    how = RobustnessProtocol(FULL, (0.0, 1 / 255 if norm == "linf" else 0.1), norm)
    zero, result = evaluate(encoder, few, dataset, how)
    assert result.clean_accuracy > 0
    assert result.robust_accuracy <= zero.robust_accuracy == zero.clean_accuracy  # eps 0 changes nothing at all
    assert result.left_out == (["apgd-dlr-targeted"] if classes < 4 else [])
    run = [attack["name"] for attack in result.attacks]
    assert run == [attack.name for attack in FULL.attacks if attack.name not in result.left_out]
    targets = {attack["target"] for attack in result.attacks if attack["target"]}
    assert targets == {f"{classes - 1} strongest wrong classes"}


def test_the_full_suite_leaves_no_trace(encoder, bank, dataset):
    """Square and FAB among the rest: mode, `requires_grad`, `param.grad` and the global random state."""
    encoder.train()
    encoder.text_model.requires_grad_(False)
    modes = [module.training for module in encoder.modules()]
    needs = [parameter.requires_grad for parameter in encoder.parameters()]
    before, state = weights_sha256(encoder), torch.get_rng_state()
    evaluate(encoder, bank, dataset.select(range(6)), RobustnessProtocol(FULL, (1 / 255,)))
    assert [module.training for module in encoder.modules()] == modes
    assert [parameter.requires_grad for parameter in encoder.parameters()] == needs
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert weights_sha256(encoder) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_radius_in_255_units_is_refused():
    for eps in (4, 8.0):
        with pytest.raises(ValueError, match=f"eps={eps:g}/255"):
            RobustnessProtocol(FULL, (eps,))
    assert replace(RobustnessProtocol(FULL, (4 / 255,)), norm="l2", eps=(4.0,)).eps == (4.0,)
