"""Swap into a Flamingo of the real `open_flamingo` package, made by its own factory from tiny parts.

The package pins versions of 2023, so it is no dependency of the tests: `.ci/run` installs it without its requirements
in an environment of its own, and fails if this file was skipped there.
"""

import copy
import json

import pytest
import torch
from tiny_vlms import LAYERS, SIZE, make_clip, randomise
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_robust_vision.evaluation.tasks import AnswerLoss, answer_task
from hf_robust_vision.swap import find_towers, hf_to_openclip, swap_vision_encoder
from hf_robust_vision.swap.flamingo import FlamingoInputs
from hf_robust_vision.towers.base import weights_sha256


open_flamingo = pytest.importorskip("open_flamingo", reason="installed by .ci/run in an environment of its own")

VISION = {"image_size": SIZE, "layers": LAYERS, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 1.5}
TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
AS_RELEASED: list = []  # the defaults of the mixin's forward before they are changed
WORDS = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(20))])}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    import open_clip
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin

    folder = tmp_path_factory.mktemp("flamingo")
    config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "tiny-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-vit.json")
    inner = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder / "lm")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **shape)).save_pretrained(folder / "lm")
    # transformers 5 calls the language model without a mask, which the mixin of 2.0.1 asks for.
    AS_RELEASED.append(FlamingoLMMixin.forward.__defaults__)
    FlamingoLMMixin.forward.__defaults__ = (None,)
    language_model = str(folder / "lm")
    model, processor, tokenizer = open_flamingo.create_model_and_transforms(
        "tiny-vit", None, language_model, language_model
    )
    return randomise(model, 1), tokenizer, processor


@pytest.fixture
def flamingo(built):
    return copy.deepcopy(built[0])


@pytest.fixture(scope="module")
def inputs(built):
    encoded = built[1]("<image> w3 w4 w5", return_tensors="pt")
    pixels = torch.randn(1, 1, 1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return {"vision_x": pixels, "lang_x": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def test_swap_forward_generate_save_reload(flamingo, built, inputs, clip, tmp_path):
    before = logits(flamingo, inputs)
    (tower,) = find_towers(flamingo)
    assert (tower.path, type(tower.module).__module__) == ("vision_encoder", "open_clip.transformer")

    report = swap_vision_encoder(flamingo, clip)

    assert report.towers[0].output_error < 1e-5
    assert report.towers[0].drift < 0.999
    wanted = hf_to_openclip(clip.state_dict())
    assert all(torch.equal(value, wanted[name]) for name, value in flamingo.vision_encoder.state_dict().items())
    after = logits(flamingo, inputs)
    assert not torch.equal(before, after)
    said = flamingo.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert said.shape[1] == inputs["lang_x"].shape[1] + 3

    torch.save(flamingo.state_dict(), tmp_path / "flamingo.pt")
    again = copy.deepcopy(built[0])
    again.load_state_dict(torch.load(tmp_path / "flamingo.pt", weights_only=True), strict=True)
    assert weights_sha256(again) == weights_sha256(flamingo)
    assert torch.equal(logits(again, inputs), after)


@torch.no_grad()
def test_flamingo_reads_the_tokens_of_the_new_tower(flamingo, inputs, clip):
    flamingo.vision_encoder.final_ln_after_pool = True  # tokens before the last norm, as it was trained with
    swap_vision_encoder(flamingo, clip)
    pixels = inputs["vision_x"].flatten(0, 2)
    wanted = clip.vision_model(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(flamingo.vision_encoder(pixels)[1], wanted, rtol=1e-5, atol=1e-5)


def test_the_projection_is_never_read(flamingo, inputs, clip):
    report = swap_vision_encoder(flamingo, clip)
    assert report.towers[0].unread_names == ["proj"]
    before = logits(flamingo, inputs)
    torch.nn.init.normal_(flamingo.vision_encoder.proj)
    assert torch.equal(logits(flamingo, inputs), before)


def test_same_weights_change_nothing(flamingo, inputs):
    before, logits_before = weights_sha256(flamingo), logits(flamingo, inputs)
    report = swap_vision_encoder(flamingo, copy.deepcopy(flamingo.vision_encoder))
    assert report.towers[0].changed == 0
    assert weights_sha256(flamingo) == before
    assert torch.equal(logits(flamingo, inputs), logits_before)


def test_restore(flamingo, inputs):
    before, logits_before = weights_sha256(flamingo), logits(flamingo, inputs)
    report = swap_vision_encoder(flamingo, make_clip(hidden_act="gelu"), hidden_act="gelu")
    assert report.towers[0].output_error < 1e-5
    report.restore()
    assert weights_sha256(flamingo) == before
    assert torch.equal(logits(flamingo, inputs), logits_before)


@pytest.mark.parametrize(
    ("vision", "options", "words"),
    [
        ({"hidden_act": "gelu"}, {}, "pass hidden_act='gelu'"),
        ({"num_attention_heads": 2}, {}, "pass num_attention_heads=2"),
        ({"num_hidden_layers": 3}, {}, "num_hidden_layers is 4"),
        ({"image_size": 48}, {}, "resize='interpolate'"),
        ({"image_size": 48}, {"resize": "native", "processor": object()}, "not for this"),
    ],
)
def test_refusals_leave_it_as_it_was(vision, options, words, flamingo):
    before = weights_sha256(flamingo)
    with pytest.raises(ValueError, match=words):
        swap_vision_encoder(flamingo, make_clip(**vision), **options)
    assert weights_sha256(flamingo) == before


def test_the_evaluation_attacks_through_it(flamingo, built, clip):
    """The class encodes images under `no_grad`; the attack sees a gradient all the same, and leaves nothing behind."""
    swap_vision_encoder(flamingo, clip)
    before = weights_sha256(flamingo)
    inputs = FlamingoInputs(flamingo, built[1], built[2])  # its own transform is compared with the factory's
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    task = answer_task(inputs, ["<image> w3", "<image> w5 w6"], ["w7", "w8"], (SIZE, SIZE))
    (gradient,) = torch.autograd.grad(AnswerLoss(task)(images.requires_grad_(True)).sum(), images)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    assert weights_sha256(flamingo) == before
    assert not any("forward" in vars(part) for part in flamingo.modules())


@torch.no_grad()
def test_the_evaluation_reads_the_same_logits_and_says_the_same(flamingo, built, inputs):
    wrapped = FlamingoInputs(flamingo, built[1], built[2])
    ids, mask = inputs["lang_x"], inputs["attention_mask"]
    images = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    vision = wrapped.transform.normalize(images)[:, None, None]
    said = flamingo.generate(vision, ids, mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    text = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(wrapped.generate(images, text, 3), said[:, ids.shape[1] :])
    assert torch.equal(wrapped.logits(images, text, 2), flamingo(vision, ids, mask).logits[:, -2:])


@torch.no_grad()
def test_generation_through_the_forward_that_demands_a_mask(flamingo, built, inputs, monkeypatch):
    """As the package was released; what is said is the same."""
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin

    wrapped = FlamingoInputs(flamingo, built[1], built[2])
    images = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    text = {"input_ids": inputs["lang_x"], "attention_mask": inputs["attention_mask"]}
    expected = wrapped.generate(images, text, 3)
    monkeypatch.setattr(FlamingoLMMixin.forward, "__defaults__", AS_RELEASED[0])
    assert torch.equal(wrapped.generate(images, text, 3), expected)
    assert not any("forward" in vars(part) for part in flamingo.modules())
