"""SigLIP is a dual encoder like CLIP: stock in everything but its forward pass, trained and measured by all that is here."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    GemmaTokenizer,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from hf_robust_vision import (
    AGFTTrainer,
    FARETrainer,
    PMGAFTTrainer,
    SimCLIPTrainer,
    TeCoATrainer,
    TIMATrainer,
    as_encoder,
    load_encoder,
    make_text_bank,
    swap_vision_encoder,
)
from hf_robust_vision.attacks import CrossEntropy, get_protocol
from hf_robust_vision.data.captions import CaptionedImages
from hf_robust_vision.evaluation.results import load_results
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.retrieval import RetrievalProtocol, evaluate_retrieval
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot
from hf_robust_vision.hub.release import prepare_release
from hf_robust_vision.hub.usage import usage_block
from hf_robust_vision.pipeline import parse, run
from hf_robust_vision.sanity.check import check_sanity
from hf_robust_vision.towers.base import Reads, freeze_unread, weights_sha256
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.siglip import SiglipEncoder
from hf_robust_vision.towers.vlm import LanguageReader
from hf_robust_vision.training.launchers import make_shardable
from hf_robust_vision.training.layers import learning_rate_scales
from tests.conftest import NAMES, SIZE, TEMPLATE, build_siglip, build_tokenizer, make_dataset, picture
from tests.towers.zoo import saved
from tests.training.helpers import arguments, make_trainer, weights


IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
PROMPTS = ["a red", "a photo of a blue"]
TRAINERS = (SimCLIPTrainer, FARETrainer, TeCoATrainer, AGFTTrainer, PMGAFTTrainer, TIMATrainer)


@pytest.fixture
def siglip(siglip_folder):
    return load_encoder(siglip_folder)


@pytest.fixture(scope="module")
def stock(siglip_folder):
    return SiglipModel.from_pretrained(siglip_folder).eval()


@pytest.fixture
def bank(siglip):
    return make_text_bank(siglip, build_tokenizer(), NAMES, TEMPLATE)


@torch.no_grad()
def test_features_are_those_of_the_stock_model_bit_for_bit(siglip, stock, siglip_folder):
    assert type(siglip) is SiglipEncoder
    assert isinstance(siglip, DualEncoder)
    processor = AutoProcessor.from_pretrained(siglip_folder)
    pixel_values = processor.image_processor((IMAGES * 255).byte(), return_tensors="pt")["pixel_values"]
    images = (IMAGES * 255).byte() / 255
    torch.testing.assert_close(siglip.transform.normalize(images), pixel_values)
    pixel_values = siglip.transform.normalize(images)
    assert torch.equal(siglip(images).image_embeds, stock.get_image_features(pixel_values).pooler_output)
    hidden = stock.vision_model(pixel_values, output_hidden_states=True).hidden_states
    for layer in (-1, -2, 0):
        assert torch.equal(siglip(images, token_layer=layer).patch_tokens, hidden[layer])  # no class token is cut off
    padded = processor.tokenizer(PROMPTS, padding="max_length", max_length=12, return_tensors="pt").input_ids
    texts = siglip.tokenize(processor.tokenizer, PROMPTS)
    assert set(texts) == {"input_ids"}
    assert torch.equal(texts["input_ids"], padded)
    wanted = stock.get_text_features(padded).pooler_output
    assert torch.equal(siglip(prompts=texts).text_embeds, wanted)
    assert torch.equal(siglip(prompts=texts | {"attention_mask": (padded != 0).long()}).text_embeds, wanted)


def test_saved_folder_is_stock(siglip, stock, tmp_path):
    siglip.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["SiglipModel"], "siglip")
    again, info = SiglipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert weights_sha256(again) == weights_sha256(siglip) == weights_sha256(stock)


def test_as_encoder_shares_weights(siglip):
    model = build_siglip()
    encoder = as_encoder(model)
    mine, theirs = dict(encoder.named_parameters()), dict(model.named_parameters())
    assert set(mine) == set(theirs)
    assert all(mine[name] is theirs[name] for name in theirs)
    assert encoder.transform == siglip.transform  # the published means, and the whole image stretched to the square


def test_every_pixel_has_a_gradient(siglip):
    for ask in ({}, {"token_layer": -2}):
        images = IMAGES.clone().requires_grad_()
        output = siglip(images, **ask)
        read = output.image_embeds if not ask else output.patch_tokens
        (gradient,) = torch.autograd.grad(read.pow(3).sum(), images)
        assert (gradient != 0).all()


@pytest.mark.parametrize("text", ["none", "projection", "encoder"])
@pytest.mark.parametrize("feature", ["pooled", "both", "patch_tokens"])
def test_freeze_unread_is_what_gradients_reach(siglip, feature, text):
    reads = Reads(feature, -2, text)
    freeze_unread(siglip, reads)
    chosen = {name for name, value in siglip.named_parameters() if value.requires_grad}
    assert any(".head." in name for name in chosen if name.startswith("vision")) == (feature != "patch_tokens")
    assert {name for name in chosen if name.startswith("text")} == {
        name
        for name, _ in siglip.named_parameters()
        if name.startswith({"none": "-", "projection": "text_model.head.", "encoder": "text_model."}[text])
    }
    siglip.requires_grad_(True)
    output = siglip(IMAGES, **reads.asked())
    looked_at = [output[name] for name in ("image_embeds", "patch_tokens") if name in reads]
    sum(part.pow(3).sum() for part in looked_at).backward()
    reached = {name for name, value in siglip.named_parameters() if value.grad is not None and value.grad.any()}
    assert {name for name in chosen if name.startswith("vision")} == reached


def test_text_bank_by_hand(siglip, stock, bank):
    padded = build_tokenizer()(
        [TEMPLATE[0].format(name) for name in NAMES], padding="max_length", max_length=12, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        whole = stock(input_ids=padded, pixel_values=siglip.transform.normalize(IMAGES))
        logits = bank.logits(siglip(IMAGES).image_embeds)
    torch.testing.assert_close(bank.embeddings, whole.text_embeds)
    torch.testing.assert_close(logits, whole.logits_per_image)  # scale and bias: its sigmoid is the pair's probability
    assert bank.logit_bias == -4
    assert torch.equal(logits.argmax(1), (logits - bank.logit_bias).argmax(1))


def test_objective_by_finite_differences(siglip_folder, bank):
    """The zero-shot attack's loss in float64: central differences along 5 random directions and at 5 pixels."""
    encoder = load_encoder(siglip_folder, dtype=torch.float64)
    objective = CrossEntropy(bank.classify(lambda images: encoder(images).image_embeds), torch.tensor([0, 1, 2]))
    images = IMAGES.double().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(images).sum(), images)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(images.shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    for place in torch.randint(images.numel(), (5,), generator=generator).tolist():
        directions.append(F.one_hot(torch.tensor(place), images.numel()).view_as(images).double())
    with torch.no_grad():
        for direction in directions:
            step = 1e-5 * direction
            slope = (objective(images + step) - objective(images - step)).sum() / 2e-5
            torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-6, atol=1e-9)
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize("kind", TRAINERS, ids=lambda kind: kind.__name__)
def test_trainers_end_in_a_stock_folder(kind, siglip_folder, tmp_path):
    changes = {"text_params": "encoder"} if kind is TIMATrainer else {}
    trainer = make_trainer(siglip_folder, tmp_path, kind=kind, max_steps=2, learning_rate=1e-3, **changes)
    before = weights(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_robust_accuracy"] <= metrics["eval_clean_accuracy"] <= 1
    trainer.save_model(str(tmp_path / "model"))
    again, info = SiglipModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    after = again.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {"vision_model", "text_model"} if kind is TIMATrainer else {"vision_model"}
    assert {name.split(".")[0] for name in moved} == wanted  # and neither the scale nor the bias
    assert weights_sha256(load_encoder(tmp_path / "model")) == weights_sha256(again)


@pytest.mark.parametrize("feature", ["pooled", "both"])
def test_lora(feature, siglip_folder, tmp_path):
    lora = {"use_peft": True, "lora_r": 2, "lora_alpha": 4, "learning_rate": 1e-2, "feature": feature}
    trainer = make_trainer(siglip_folder, tmp_path, max_steps=2, **lora)
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all(name.startswith("vision_model") and ".lora_" in name for name in trained)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    # All of them, or DDP would wait for the others: torch's attention reads past an adapter on its last layer.
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    trainer.save_model(str(tmp_path / "model"))
    assert isinstance(load_encoder(tmp_path / "model"), SiglipEncoder)


@pytest.mark.parametrize("family", ["paligemma", "gemma3", "llava_onevision"])
def test_training_through_the_projector_of_a_vlm(family, tmp_path):
    """What the VLM's language model would read; the VLM's own tower may lack the head, which then does not train."""
    vlm, _ = saved(family, tmp_path / "vlm")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 40, "bos_token_id": 2, "eos_token_id": 3}
    vision = vlm.config.vision_config.to_dict() | {"vision_use_head": True}
    encoder = as_encoder(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))
    encoder.read_by(LanguageReader(str(tmp_path / "vlm")))
    args = arguments(tmp_path / "run", max_steps=2, feature="language_tokens", learning_rate=1e-3)
    trainer = SimCLIPTrainer(encoder, args, make_dataset(12))
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("vision_model.") and ".head." not in name for name in moved)
    trainer.save_model(str(tmp_path / "model"))
    again = SiglipModel.from_pretrained(tmp_path / "model")
    report = swap_vision_encoder(vlm, again)
    assert report.towers[0].output_error < 1e-5


def test_layers_fit(siglip_folder, siglip, tmp_path):
    scales = learning_rate_scales(siglip, 0.5)
    steps = {
        "vision_model.embeddings.patch_embedding.weight": 3, "vision_model.encoder.layers.0.mlp.fc1.bias": 2,
        "vision_model.encoder.layers.1.mlp.fc1.bias": 1, "vision_model.head.probe": 0, "text_model.head.weight": 0,
        "text_model.embeddings.token_embedding.weight": 3, "logit_bias": 0,
    }  # fmt: skip
    assert {name: scales[name] for name in steps} == {name: 0.5**count for name, count in steps.items()}
    trainer = make_trainer(siglip_folder, tmp_path, freeze_blocks=1)
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert not any("embeddings" in name or ".layers.0." in name for name in trained)
    assert any(".layers.1." in name for name in trained)


def test_fsdp_has_no_parameter_without_dimensions(siglip, encoder):
    for model in (siglip, encoder):
        before = model.state_dict()
        make_shardable(model)
        assert not any("logit_" in name for name, _ in model.named_parameters())
        assert set(model.state_dict()) == set(before)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_zero_shot_retrieval_and_sanity(siglip, bank, tmp_path):
    how = RobustnessProtocol(get_protocol("apgd-ce", steps=3), (4 / 255,))
    images = make_dataset(9, "test")
    with torch.no_grad():
        seen = bank.logits(siglip(torch.stack([item["images"] for item in images])).image_embeds).argmax(1)
    for row, label in zip(images.rows, seen.tolist()):
        row["label"] = label  # it is right about all, until it is attacked
    (result,) = evaluate_zero_shot(siglip, bank, images, how, model_name="m", progress=False)
    assert result.logit_scale == pytest.approx(bank.logit_scale)
    assert result.robust_accuracy < result.clean_accuracy == 1
    found = check_sanity(siglip, bank, images, how, samples=4, queries=10)
    assert len(found["checks"]) > 5
    rows = [{"image": picture(i, i % 3), "captions": [f"a {NAMES[i % 3]}"]} for i in range(4)]
    captions = CaptionedImages(rows, siglip.transform, name="tiny", split="test")
    results = evaluate_retrieval(
        siglip,
        build_tokenizer(),
        captions,
        RetrievalProtocol((4 / 255,), steps=2, ks=(1,)),
        model_name="m",
        progress=False,
    )
    assert {one.metric for one in results} == {"image_to_text_recall@1", "text_to_image_recall@1"}


def test_a_run_from_folder_to_card(siglip_folder, image_folder, tmp_path):
    """Measured before and after; the card says which class it is, pads and drops the mask as SigLIP wants it."""
    words = f"""--model_name_or_path {siglip_folder} --dataset_name {image_folder} --output_dir {tmp_path / "out"}
    --max_steps 2 --per_device_train_batch_size 4 --attack_steps 2 --test_steps 2 --validation_split validation
    --test_eps 2/255 --attack_eps 2/255 --report_to none --use_cpu true --templates demo --save_strategy no
    --disable_tqdm true"""
    run(SimCLIPTrainer, *parse(SimCLIPTrainer, words.split()))
    folder = tmp_path / "out"
    after = [one for one in load_results(folder) if one.model == "after"]
    assert after[0].model_sha256 == weights_sha256(SiglipModel.from_pretrained(folder))
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "SiglipProcessor"
    card = (folder / "README.md").read_text()
    assert "A `SiglipModel`" in card
    assert "- siglip\n" in card
    assert "CLIPModel" not in card
    release = prepare_release(folder, base_model="me/siglip")
    text = release.card_for("me/robust").decode()
    assert 'SiglipModel.from_pretrained("me/robust")' in text
    code = text.split("```python\n")[1].split("```")[0].replace("me/robust", str(folder))
    exec(compile(code, "card", "exec"), {})
    loud = replace(after[0], class_names=["Red", "BLUE"], templates=["A photo of {}"])
    for family, prompts in {
        "Siglip": '"a photo of red", "a photo of blue"',
        "CLIP": '"A photo of Red", "A photo of BLUE"',
    }.items():
        assert f"[{prompts}]" in usage_block("model", "me/robust", loud, family=family)
    with pytest.raises(ValueError, match="push a SiglipModel whole"):
        prepare_release(folder, "tower", base_model="me/siglip")


def test_siglip_2_of_a_fixed_size(tmp_path):
    """A `SiglipModel` with Gemma's tokenizer, which minds the case."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyzR"]
    tokenizer = GemmaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    images = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    build_siglip().save_pretrained(tmp_path)
    SiglipProcessor(images, tokenizer).save_pretrained(tmp_path)
    encoder, loaded = load_encoder(tmp_path), load_tokenizer(tmp_path)
    assert type(encoder) is SiglipEncoder
    assert type(loaded) is GemmaTokenizer
    texts = encoder.tokenize(loaded, ["a Red", "a red"])["input_ids"]
    padded = tokenizer("a red", padding="max_length", max_length=12).input_ids
    assert texts.tolist() == [padded, padded]
    bank = make_text_bank(encoder, loaded, ["Red", "blue"], ["a {}"])
    with torch.no_grad():
        wanted = SiglipModel.from_pretrained(tmp_path).eval().get_text_features(torch.tensor([padded])).pooler_output
    torch.testing.assert_close(bank.embeddings[:1], F.normalize(wanted))


class TestRefusals:
    @pytest.fixture
    def broken(self, siglip_folder, tmp_path):
        return shutil.copytree(siglip_folder, tmp_path / "broken")

    def test_missing_weights(self, broken):
        state = load_file(broken / "model.safetensors")
        del state["vision_model.head.probe"], state["logit_bias"]
        save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 2 weights of the SiglipModel.*logit_bias"):
            load_encoder(broken)

    def test_processor_of_another_resolution(self, broken):
        for path in broken.glob("*processor_config.json"):
            path.write_text(path.read_text().replace("32", "64"))
        with pytest.raises(ValueError, match=r"\(64, 64\).*32 px"):
            load_encoder(broken)

    def test_naflex(self, tmp_path):
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = small | {"vocab_size": 40, "bos_token_id": 2, "eos_token_id": 3}
        model = Siglip2Model(Siglip2Config(vision_config=small | {"num_patches": 16}, text_config=text))
        with pytest.raises(ValueError, match="Siglip2Model is a SigLIP 2 of free image size"):
            as_encoder(model)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"free image size \(NaFlex\).*of a fixed size"):
            load_encoder(tmp_path)

    def test_bare_vision_tower(self, siglip_folder, tmp_path):
        tower = build_siglip().vision_model
        with torch.no_grad():
            tower.post_layernorm.bias += 1
        tower.save_pretrained(tmp_path)
        told = "bare SiglipVisionModel lacks .*load the SiglipModel that it came from"
        with pytest.raises(ValueError, match=f"'siglip_vision_model' model.*or SiglipModel. A {told}") as refused:
            load_encoder(tmp_path)
        with pytest.raises(TypeError, match=f"got SiglipVisionModel. A {told}"):
            as_encoder(tower)
        (typed,) = re.findall(r"type (model\..*\)) and save", str(refused.value))
        model = SiglipModel.from_pretrained(siglip_folder)
        exec(typed, {"model": model, "tower": tower})
        embeds = as_encoder(model)(IMAGES).image_embeds
        assert torch.equal(embeds, tower(as_encoder(model).transform.normalize(IMAGES)).pooler_output)
