"""OpenFlamingo's structure: the gradient passes its `no_grad`, generation obeys padding, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_robust_vision.evaluation.tasks import AnswerLoss, VLMProtocol, answer_task, evaluate_targeted, evaluate_vqa
from hf_robust_vision.evaluation.tasks.answers import say
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.swap.flamingo import FlamingoInputs
from hf_robust_vision.towers.base import attack_mode, weights_sha256
from tests.swap.tiny_vlms import IMAGE_TOKEN, VIDEO_TOKEN, VOCAB
from tests.towers.flamingo_stand_in import make_flamingo
from tests.towers.tiny_processors import Asked, make_tokenizer


PROMPT = "<image> w4 {} w5"
ABOUT = {"prompt": PROMPT, "model_name": "before", "dataset": "noise", "split": "test", "progress": False}


@pytest.fixture(scope="module")
def model():
    return make_flamingo(VOCAB, IMAGE_TOKEN, VIDEO_TOKEN)


@pytest.fixture(scope="module")
def inputs(model):
    return FlamingoInputs(model, make_tokenizer())


@pytest.fixture(autouse=True)
def _left_as_it_was(model):
    """Weights, methods, mode and the state of conditioning."""
    before = weights_sha256(model), {name: set(vars(module)) for name, module in model.named_modules()}
    yield
    assert (weights_sha256(model), {name: set(vars(module)) for name, module in model.named_modules()}) == before
    assert not model.lang_encoder._use_cached_vision_x
    assert all(layer.vis_x is None for layer in model.lang_encoder.model.layers)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def prompts(inputs):
    return inputs.encode(["<image> w7", "w9 <image> w8 w10 w11", "<image>"], (32, 32))


def test_the_original_gives_no_gradient_and_the_adapter_the_right_one(model, inputs, images):
    """Against finite differences of the model's own forward pass, in double precision."""
    text = inputs.padded(prompts(inputs))
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))

    def value(images):
        vision = inputs.transform.normalize(images)[:, None, None]
        return (
            model(vision_x=vision, lang_x=text["input_ids"], attention_mask=text["attention_mask"])
            .logits[:, -1, 7]
            .sum()
        )

    with attack_mode(model):
        assert not value(images.requires_grad_(True)).requires_grad
        (gradient,) = torch.autograd.grad(inputs.logits(images, text, 1)[:, -1, 7].sum(), images)
        with torch.no_grad():
            slope = (value(images + 3e-4 * direction) - value(images - 3e-4 * direction)) / 6e-4
            assert not inputs.logits(images, text, 1).requires_grad
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=2e-2)


def test_generation_is_greedy_whatever_the_padding(inputs, images):
    """Against the likeliest token, one at a time, without a batch."""
    batched = say(inputs, prompts(inputs), images, 4)
    assert len(set(batched)) > 1
    for place, row in enumerate(prompts(inputs)):
        sequence = torch.tensor([row["input_ids"]])
        for _ in range(4):
            with torch.no_grad():
                text = {"input_ids": sequence, "attention_mask": torch.ones_like(sequence)}
                logits = inputs.logits(images[place : place + 1], text, 1)
            sequence = torch.cat([sequence, logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert inputs.tokenizer.decode(sequence[0, len(row["input_ids"]) :]) == batched[place]


def test_questions_and_targets(model, inputs, monkeypatch):
    monkeypatch.setattr(model, "eoc_token_id", list(range(VOCAB)))  # it answers in one word
    asked = [Asked(place) for place in range(3)]
    said = say(
        inputs, inputs.encode([PROMPT.format("w5")] * 3, (32, 32)), torch.stack([a.pixels(inputs) for a in asked]), 1
    )
    asked = [replace(question, answer=answer) for question, answer in zip(asked, said)]
    how = VLMProtocol((0.0, 0.5), steps=10, restarts=1)
    clean, attacked = evaluate_vqa(model, inputs, asked, how, **ABOUT)
    assert clean.robust_accuracy == clean.clean_accuracy == 1
    assert attacked.robust_accuracy < 1
    target = next(f"w{word}" for word in range(10, 60) if f"w{word}" not in said)
    (result,) = evaluate_targeted(
        model, inputs, asked, target, VLMProtocol((1.0,), steps=2), **ABOUT, max_new_tokens=1
    )
    assert result.attack_success["clean"] == 0


def test_an_error_on_the_way_leaves_nothing_behind(model, inputs, images):
    with pytest.raises(RuntimeError):
        inputs.logits(images[..., :20], inputs.padded(prompts(inputs)), 1)
    with pytest.raises(RuntimeError):
        inputs.generate(images[..., :20], inputs.padded(prompts(inputs)), 2)
    forward = model.vision_encoder.forward
    model.vision_encoder.forward = own = lambda *args: forward(*args)  # as accelerate's hooks do
    try:
        inputs.logits(images, inputs.padded(prompts(inputs)), 1)
        assert model.vision_encoder.forward is own
    finally:
        del model.vision_encoder.forward


def test_transform_is_compared_with_the_models_own(model):
    """The size is that of the vision encoder; another mean is noticed."""
    right = PixelTransform(32, (32, 32))

    def transform(picture):
        from tests.towers.tiny_processors import as_images

        return right.normalize(right.fit(as_images(picture)))[0]

    assert FlamingoInputs(model, make_tokenizer(), transform).transform == right
    grey = replace(right, mean=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="pixels that differ by up to"):
        FlamingoInputs(model, make_tokenizer(), transform, transform=grey)


def test_other_models_and_tokenizers_are_refused(model):
    with pytest.raises(TypeError, match="VisionTransformer is no OpenFlamingo model: it has no vision_encoder"):
        FlamingoInputs(model.vision_encoder, make_tokenizer())
    tokenizer = make_tokenizer()
    tokenizer_without = type("Plain", (), {"__call__": lambda self, text, **_: {"input_ids": [5, 6]}})()
    with pytest.raises(ValueError, match="the tokenizer splits '<image>'"):
        FlamingoInputs(model, tokenizer_without)
    with pytest.raises(ValueError, match="must hold the image token '<image>' once"):
        FlamingoInputs(model, tokenizer).encode(["w1"], (32, 32))


def test_without_the_adapter_the_attack_says_what_is_wrong(model, inputs, images, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("hf_robust_vision.swap.flamingo.gradient_through_encoder", lambda _: nullcontext())
    task = answer_task(inputs, [PROMPT] * 3, ["w7"] * 3, (32, 32))
    with attack_mode(model), pytest.raises(RuntimeError, match="no gradient reaches the images: Flamingo encodes"):
        AnswerLoss(task)(images.requires_grad_(True))
