"""One image under attack: what is said of it is what stock transformers say, and all that is wrong is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoProcessor, CLIPModel, LlavaForConditionalGeneration

from hf_robust_vision.data.demo import CLASS_NAMES, demo_checkpoint, demo_rows
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.pipeline.one_image import SHARES, attack_image, open_model


pytest.importorskip("easy_vqa")
EPS = 8 / 255
QUESTION = "what color is the shape?"


@pytest.fixture(scope="module")
def file():
    return next(row["image"] for row in demo_rows("test") if CLASS_NAMES[row["label"]] == "blue rectangle")


@pytest.fixture(scope="module")
def clip():
    return open_model("demo-clip")


@pytest.fixture(scope="module")
def llava():
    return open_model("demo-llava")


def check(found):
    assert [look.eps for look in found.looks] == [0, *(share * EPS for share in SHARES)]
    assert (found.adversarial - found.clean).abs().max() <= EPS + 1e-6
    assert 0 <= found.adversarial.min() <= found.adversarial.max() <= 1
    assert found.clean.shape == found.adversarial.shape == (3, 64, 64)
    clean, *attacked = found.looks
    assert not clean.fell
    assert [look.fell for look in attacked] == [look.answer != clean.answer for look in attacked]
    assert [look.fell for look in attacked] == sorted(look.fell for look in attacked)  # what fell stays fallen


def test_a_clip_is_asked_as_stock_transformers_ask_it(clip, file):
    found = attack_image(clip, file, CLASS_NAMES, EPS)
    check(found)
    assert found.looks[0].answer == "blue rectangle"
    assert found.looks[-1].fell
    model, processor = CLIPModel.from_pretrained(demo_checkpoint()), AutoProcessor.from_pretrained(demo_checkpoint())
    model.eval()
    prompts = [template.format(name) for name in CLASS_NAMES for template in get_templates("demo")]
    with torch.no_grad():
        texts = model.get_text_features(**processor.tokenizer(prompts, padding=True, return_tensors="pt"))
        texts = getattr(texts, "pooler_output", texts)
        texts = torch.nn.functional.normalize(texts, dim=-1).view(len(CLASS_NAMES), -1, texts.shape[-1]).mean(1)
        for image, look in ((found.clean, found.looks[0]), (found.adversarial, found.looks[-1])):
            pixels = processor.image_processor(image, do_rescale=False, return_tensors="pt")["pixel_values"]
            image_embeds = model.get_image_features(pixels)
            image_embeds = getattr(image_embeds, "pooler_output", image_embeds)
            cosines = torch.cosine_similarity(image_embeds[:, None], texts[None], dim=-1)
            shares = (model.logit_scale.exp() * cosines).softmax(1)[0]
            assert CLASS_NAMES[int(shares.argmax())] == look.answer
            assert float(shares[CLASS_NAMES.index("blue rectangle")]) == pytest.approx(look.confidence, abs=2e-3)


def test_a_vlm_is_asked_as_stock_transformers_ask_it(llava, file):
    found = attack_image(llava, file, QUESTION, EPS)
    check(found)
    assert found.looks[0].answer == "blue"
    folder = demo_checkpoint("demo-llava")
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model.eval()
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for image, look in ((found.clean, found.looks[0]), (found.adversarial, found.looks[-1])):
        inputs = processor(images=image, text=prompt, do_rescale=False, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
            said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(said, skip_special_tokens=True).strip() == look.answer
        (token,) = processor.tokenizer(" blue", add_special_tokens=False)["input_ids"]
        assert float(logits.softmax(0)[token]) == pytest.approx(look.confidence, abs=2e-3)


def test_the_same_call_finds_the_same(clip, file):
    one, two = (attack_image(clip, file, CLASS_NAMES, EPS, steps=5, seed=3) for _ in range(2))
    assert one.looks == two.looks
    assert torch.equal(one.adversarial, two.adversarial)


def test_the_answer_of_the_file_is_that_of_the_rounded_image(clip, file, tmp_path):
    from hf_robust_vision.app.show import picture

    found = attack_image(clip, file, CLASS_NAMES, EPS)
    saved = tmp_path / "adversarial.png"
    picture(found.adversarial).save(saved)
    again = attack_image(clip, saved, CLASS_NAMES, EPS, steps=1)
    assert again.looks[0].answer == found.answer_of_file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (["red circle"], "at least two"),
        ("red circle", "at least two"),
        (["red circle", "red circle"], "each once"),
        (["red circle", "xylophone"], "does not know 'xylophone'"),
        (["red circle", "RED CIRCLE"], "each once"),
    ],
)
def test_class_names_that_are_no_choice_are_refused(clip, file, text, words):
    with pytest.raises(ValueError, match=words):
        attack_image(clip, file, text, EPS)


@pytest.mark.parametrize(
    ("text", "words"), [("", "wanted one"), (["red", "blue"], "wanted one"), ("<image> <image>", "once")]
)
def test_what_is_no_question_is_refused(llava, file, text, words):
    with pytest.raises(ValueError, match=words):
        attack_image(llava, file, text, EPS)


@pytest.mark.parametrize("name", ["/no/such/folder", "no such model", ""])
def test_a_name_that_is_no_models_is_refused(name):
    with pytest.raises(ValueError, match="folder"):
        open_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a model folder nor"):
        open_model(str(tmp_path))


def test_a_bare_tower_and_a_text_model_are_refused(tmp_path, clip_folder):
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=8, **small)).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="neither a CLIP nor a vision-language model"):
        open_model(str(tmp_path / "text"))
    CLIPModel.from_pretrained(clip_folder).vision_model.save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="A bare CLIPVisionModel lacks"):
        open_model(str(tmp_path / "tower"))
