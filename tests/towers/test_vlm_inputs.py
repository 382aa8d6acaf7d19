"""What the evaluators feed to a VLM is what its stock processor would, with a gradient; other processors are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_robust_vision.evaluation.tasks import VLMProtocol, answer_task, evaluate_vqa
from hf_robust_vision.evaluation.tasks.answers import continuation, say
from hf_robust_vision.towers.base import attack_mode, weights_sha256
from hf_robust_vision.towers.vlm_inputs import VLMInputs, vlm_inputs
from tests.swap.tiny_vlms import FAMILY, SIZE, VOCAB, make_vlm
from tests.towers.tiny_processors import (
    PROMPT,
    Asked,
    as_images,
    make_processor,
    make_speaker,
    make_tokenizer,
    picture,
)


TILED = ("llava_next", "llava_next_video")
SHAPES = [(SIZE, SIZE), (45, 23), (20, 90)]


@pytest.fixture(scope="module", params=FAMILY)
def family(request):
    return request.param, make_speaker(request.param), make_processor(request.param)


@pytest.fixture(scope="module")
def llava():
    return make_vlm("llava")


@pytest.fixture(scope="module")
def next_vlm():
    return make_vlm("llava_next")


def stock_inputs(processor, image, prompt):
    encoded = dict(processor(images=image, text=prompt, return_tensors="pt"))
    if "pixel_values_images" in encoded:
        encoded["pixel_values"] = encoded.pop("pixel_values_images")
    return encoded


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_are_those_of_the_stock_processor(family, shape):
    """Of a raw picture; for tiled models it goes in as it is, for the others it is fitted first."""
    name, vlm, processor = family
    inputs, image = vlm_inputs(vlm, processor), picture(1, *shape)
    images = as_images(image) if name in TILED else inputs.fit(as_images(image))
    ours, stock = inputs.pixels(images), stock_inputs(processor, image, "<image>")
    assert ours["pixel_values"].shape == stock["pixel_values"].shape
    gap = (ours["pixel_values"] - stock["pixel_values"]).abs().max() * max(processor.image_processor.image_std)
    assert gap <= 2.5 / 255
    if name in TILED:
        assert ours["image_sizes"].tolist() == stock["image_sizes"].tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_those_of_the_stock_processor(family, shape):
    """The attacked image, saved with 8 bits and given to the stock processor, gives the model the same logits."""
    name, vlm, processor = family
    inputs = vlm_inputs(vlm, processor)
    fitted = (inputs.fit(as_images(picture(2, *shape))) * 255).round() / 255
    image = (fitted[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    prompt = PROMPT.format("w5 w6")
    text = inputs.padded(inputs.encode([prompt], tuple(fitted.shape[-2:])))
    stock = stock_inputs(processor, image, prompt)
    assert text["input_ids"].tolist() == stock["input_ids"].tolist()
    with torch.no_grad():
        ours, expected = inputs.logits(fitted, text, 3), vlm(**stock).logits[:, -3:]
    # The small view of a tiled image is resized, and rounded to 8 bits by the stock processor only.
    assert (ours - expected).abs().max() <= (0.05 if name in TILED else 1e-4) * expected.abs().max()


def test_gradient_passes_through_padding_tiles_and_the_resized_view():
    """Against differences of a weighted sum of the pixel values, which are linear in images that nothing is cut of.

    Stock processors normalise in float32, so a wide step is as exact as it gets.
    """
    inputs = vlm_inputs(make_vlm("llava_next"), make_processor("llava_next"))
    generator = torch.Generator().manual_seed(0)
    images = inputs.fit(as_images(picture(3, 45, 30))).clamp(0.4, 0.6)
    direction = torch.rand(images.shape, generator=generator) - 0.5
    weights = torch.randn(inputs.pixels(images)["pixel_values"].shape, generator=generator)

    def value(images):
        return (weights * inputs.pixels(images)["pixel_values"]).double().sum()

    (gradient,) = torch.autograd.grad(value(images.requires_grad_(True)), images)
    slope = (value(images + 0.2 * direction) - value(images - 0.2 * direction)) / 0.4
    assert (gradient * direction).double().sum().item() == pytest.approx(slope.item(), rel=1e-5)
    assert (gradient != 0).all()


def test_every_class_is_attacked_at_two_sizes_and_left_as_it_was(family, tmp_path, monkeypatch):
    _, vlm, processor = family
    monkeypatch.setattr(vlm.generation_config, "eos_token_id", list(range(VOCAB)))  # it answers in one word
    asked = [Asked(place, text="w5 w6"[: 2 + 3 * (place % 2)], size=SHAPES[1 + place % 2]) for place in range(4)]
    inputs = vlm_inputs(vlm, processor)
    said = []
    for question in asked:  # the model is right about all, until it is attacked
        image = question.pixels(inputs)[None]
        prompts = inputs.encode([PROMPT.format(question.text)], tuple(image.shape[-2:]))
        said += say(inputs, prompts, image, 1)
    asked = [replace(question, answer=answer) for question, answer in zip(asked, said)]
    before = weights_sha256(vlm)
    how = VLMProtocol((0.02, 0.9), steps=10, restarts=2, batch_size=3, algorithm="apgd")
    settings = {"prompt": PROMPT, "model_name": "before", "dataset": "noise", "split": "test", "progress": False}
    small, large = evaluate_vqa(vlm, processor, asked, how, samples_dir=tmp_path, **settings)
    assert small.clean_accuracy == 1
    assert large.robust_accuracy < 1
    assert large.attacks[0]["algorithm"] == "apgd"
    assert [line.split(",")[0] for line in (tmp_path / large.samples).read_text().splitlines()] == [
        f'{{"id": {place}' for place in range(4)
    ]
    assert weights_sha256(vlm) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vlm.parameters())


def test_padding_changes_no_logits(llava):
    """A short prompt beside a long one."""
    inputs = vlm_inputs(llava, make_processor("llava"))
    images = as_images(picture(4, SIZE, SIZE)).repeat(2, 1, 1, 1)
    prompts, answers = [PROMPT.format("w5"), PROMPT.format("w5 w6 w9")], ["w7 w8", "w7"]
    both = answer_task(inputs, prompts, answers, (SIZE, SIZE)).logits(images)
    alone = answer_task(inputs, prompts[:1], answers[:1], (SIZE, SIZE)).logits(images[:1])
    assert torch.allclose(both[:1], alone, atol=1e-4)


def test_continuation_joins_as_the_tokenizer_would():
    inputs = vlm_inputs(make_vlm("llava"), make_processor("llava"))
    assert continuation(inputs, "w1 :", "w7 w8") == [7, 8]
    assert continuation(inputs, "w1\n", "w7") == [7]
    with pytest.raises(ValueError, match="makes no token of ' '"):
        continuation(inputs, "w1", " ")


def test_a_processor_that_works_on_no_tensors_is_refused(llava):
    """One that pads in numpy; the check at load sees it, not the setting's name."""
    processor = make_processor("llava")
    real = processor.image_processor

    class Padding:
        def __getattr__(self, name):
            return getattr(real, name)

        def __call__(self, images, **settings):
            pixels = np.asarray(images[0] if isinstance(images, list) else images)
            side = max(pixels.shape[:2])
            square = np.zeros((side, side, 3), np.uint8)
            square[: pixels.shape[0], : pixels.shape[1]] = pixels
            return real(square, **settings)

    processor.image_processor = Padding()
    with pytest.raises(ValueError, match="Padding does not work on tensors .*write a VLMInputs"):
        vlm_inputs(llava, processor)


def test_a_processor_that_treats_tensors_in_another_way_is_refused(llava):
    processor = make_processor("llava")
    real = processor.image_processor

    class Darker(type(real)):
        def __call__(self, images, **settings):
            if not isinstance(images, list):
                images = images.point(lambda grey: grey // 2)
            return super().__call__(images, **settings)

    real.__class__ = Darker
    with pytest.raises(ValueError, match="LlavaProcessor and this evaluator turn the same picture into pixels that"):
        vlm_inputs(llava, processor)


def test_unknown_kinds_of_processors_are_refused_by_name(llava, next_vlm):
    with pytest.raises(TypeError, match="got .*Tokeniz.* without image_processor"):
        vlm_inputs(llava, make_tokenizer())
    with pytest.raises(ValueError, match="image_grid_pinpoints of the model are .* of its processor"):
        vlm_inputs(next_vlm, make_processor("llava_next", image_grid_pinpoints=[[64, 64]]))

    class MoreOutputs(type(make_processor("llava"))):
        def __call__(self, *args, **kwargs):
            return {**super().__call__(*args, **kwargs), "pixel_attention_mask": torch.ones(1)}

    processor = make_processor("llava")
    processor.__class__ = MoreOutputs
    with pytest.raises(ValueError, match=r"MoreOutputs gives \['pixel_attention_mask'\]"):
        vlm_inputs(llava, processor)


def test_prompt_needs_one_image_token(llava):
    inputs = vlm_inputs(llava, make_processor("llava"))
    for prompt in ("w1", "<image> <image> w1"):
        with pytest.raises(ValueError, match="must hold the image token '<image>' once"):
            inputs.encode([prompt], (SIZE, SIZE))


def test_inputs_of_another_model_are_refused(llava, next_vlm):
    inputs = vlm_inputs(llava, make_processor("llava"))
    assert vlm_inputs(llava, inputs) is inputs
    with pytest.raises(ValueError, match="made for another model"):
        vlm_inputs(next_vlm, inputs)


def test_a_model_that_blocks_the_gradient_is_refused(llava):
    class Blocked(VLMInputs):
        def encode(self, prompts, size):
            return [{"input_ids": [1, 5], "attention_mask": [1, 1]} for _ in prompts]

        def logits(self, images, text, keep):
            with torch.no_grad():
                return images.mean() * torch.ones(len(images), keep, 64)

    inputs = Blocked(llava, make_tokenizer(), vlm_inputs(llava, make_processor("llava")).transform)
    task = answer_task(inputs, ["w1"], ["w7"], (SIZE, SIZE))
    with attack_mode(llava), pytest.raises(RuntimeError, match="no gradient reaches the images: LlavaFor"):
        task.logits(torch.rand(1, 3, SIZE, SIZE).requires_grad_(True))


def test_two_questions_of_one_id_are_refused_before_anything_is_measured(llava, tmp_path):
    """One record would count for both."""
    asked = [Asked(0), Asked(1), replace(Asked(0), text="w6")]
    settings = {"prompt": PROMPT, "model_name": "before", "dataset": "noise", "split": "test", "progress": False}
    with pytest.raises(
        ValueError, match=r"1 ids name more than one sample \(0\): give every sample, .* an id of its own"
    ):
        evaluate_vqa(llava, make_processor("llava"), asked, VLMProtocol((0.1,)), samples_dir=tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_protocol_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown algorithm 'fgsm'; choose one of"):
        VLMProtocol((0.1,), algorithm="fgsm")
    with pytest.raises(ValueError, match="unknown objectives \\['ce'\\]"):
        VLMProtocol((0.1,), objectives=("nll", "ce"))


def test_a_tokenizer_that_does_not_know_the_image_token_is_refused(llava, monkeypatch):
    """findings-swap 13: every prompt would hold an unknown word in the place of the image."""
    processor = make_processor("llava")
    monkeypatch.setattr(processor, "image_token", "<picture>")
    with pytest.raises(ValueError, match="does not know the image token '<picture>'"):
        vlm_inputs(llava, processor)
