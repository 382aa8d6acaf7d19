"""The trainable encoder is a stock CLIPModel in everything but its forward pass."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from hf_robust_vision.towers import text_bank
from hf_robust_vision.towers.base import Reads, attack_mode, freeze_unread, tensor_sha256, weights_sha256
from hf_robust_vision.towers.clip import CLIPEncoder, CLIPVisionEncoder
from hf_robust_vision.towers.load import as_encoder, load_encoder
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.reference import Reference
from hf_robust_vision.towers.text_bank import make_text_bank
from tests.conftest import NAMES, build_clip


IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TEMPLATES = ("a photo of a {}", "a {}", "this is a {}")


@pytest.fixture(scope="module")
def stock(clip_folder):
    return CLIPModel.from_pretrained(clip_folder).eval()


@torch.no_grad()
def test_features_are_those_of_the_stock_model(encoder, stock, processor):
    pixel_values = encoder.transform.normalize(IMAGES)
    output = encoder(IMAGES, token_layer=-2)
    vision = stock.vision_model(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(output.image_embeds, stock.visual_projection(vision.pooler_output))
    for layer in (-1, -2, 0, 1):
        tokens = encoder(IMAGES, token_layer=layer).patch_tokens
        assert tokens.shape == (3, 16, 32)
        torch.testing.assert_close(tokens, vision.hidden_states[layer][:, 1:])
    prompts = processor.tokenizer(["a red", "a photo of a blue"], padding=True, return_tensors="pt")
    whole = stock(pixel_values=pixel_values, **prompts)
    texts = encoder(prompts=dict(prompts)).text_embeds
    torch.testing.assert_close(torch.nn.functional.normalize(texts, dim=-1), whole.text_embeds)
    both = encoder(IMAGES, prompts=dict(prompts))
    torch.testing.assert_close(both.text_embeds, texts)
    torch.testing.assert_close(both.image_embeds, output.image_embeds)


def test_saved_folder_is_stock(encoder, stock, tmp_path):
    assert set(encoder.state_dict()) == set(stock.state_dict())
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["CLIPModel"]
    assert config["model_type"] == "clip"
    again, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert weights_sha256(again) == weights_sha256(encoder) == weights_sha256(stock)


def test_as_encoder_shares_weights_and_mode():
    model = build_clip().train()
    encoder = as_encoder(model)
    assert type(encoder) is CLIPEncoder
    assert encoder.training
    assert not any(p.is_meta for p in encoder.parameters())
    mine, theirs = dict(encoder.named_parameters()), dict(model.named_parameters())
    assert set(mine) == set(theirs)
    assert all(mine[name] is theirs[name] for name in theirs)
    assert set(dict(encoder.named_buffers())) == set(dict(model.named_buffers()))
    assert as_encoder(encoder) is encoder
    copied = copy.deepcopy(encoder)
    assert copied.logit_scale is not encoder.logit_scale
    torch.testing.assert_close(copied.eval()(IMAGES).image_embeds, encoder.eval()(IMAGES).image_embeds)


def test_as_encoder_of_another_class():
    with pytest.raises(TypeError, match=r"got CLIPVisionModel\. A bare CLIPVisionModel .*the CLIPModel that it came"):
        as_encoder(CLIPVisionModel(build_clip().config.vision_config))
    with pytest.raises(TypeError, match=r"got BertModel\.$"):
        as_encoder(BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)))


def vision_folder(clip_folder, folder, kind):
    model = CLIPModel.from_pretrained(clip_folder)
    config = copy.deepcopy(model.config.vision_config)
    config.projection_dim = model.config.projection_dim
    tower = kind(config)
    own = tower.state_dict()
    taken = {key: model.state_dict()[key if key in model.state_dict() else f"vision_model.{key}"] for key in own}
    tower.load_state_dict(taken)
    tower.save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (clip_folder / name).is_file():
            shutil.copy(clip_folder / name, folder)
    return folder


@torch.no_grad()
def test_vision_tower_with_projection(clip_folder, encoder, tmp_path):
    folder = vision_folder(clip_folder, tmp_path / "tower", CLIPVisionModelWithProjection)
    tower = load_encoder(folder)
    assert type(tower) is CLIPVisionEncoder
    assert tower.transform == encoder.transform
    torch.testing.assert_close(tower(IMAGES).image_embeds, encoder(IMAGES).image_embeds)
    tower.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["CLIPVisionModelWithProjection"]
    _, info = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]


class TestRefusals:
    """Nothing that would be partly random, or is another model, is loaded."""

    @pytest.fixture
    def broken(self, clip_folder, tmp_path):
        return shutil.copytree(clip_folder, tmp_path / "broken")

    def test_missing_weights(self, broken):
        weights = load_file(broken / "model.safetensors")
        del weights["visual_projection.weight"], weights["text_model.final_layer_norm.bias"]
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 2 weights.*text_model.final_layer_norm.bias"):
            load_encoder(broken)

    def test_weights_of_another_shape(self, broken):
        config = json.loads((broken / "config.json").read_text())
        config["projection_dim"] = 20
        (broken / "config.json").write_text(json.dumps(config))
        with pytest.raises((ValueError, RuntimeError), match="visual_projection|size mismatch|mismatch"):
            load_encoder(broken, ignore_mismatched_sizes=True)

    def test_other_model_type(self, tmp_path):
        config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        BertModel(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"'bert' model.*wanted a CLIPModel"):
            load_encoder(tmp_path)

    def test_bare_vision_model(self, clip_folder, tmp_path):
        folder = vision_folder(clip_folder, tmp_path / "bare", CLIPVisionModel)
        with pytest.raises(ValueError, match="A bare CLIPVisionModel lacks.*load the CLIPModel that it came from"):
            load_encoder(folder)

    @pytest.mark.parametrize("with_config", [False, True])
    def test_adapter(self, with_config, broken):
        adapter = {"base_model_name_or_path": "some/clip", "peft_type": "LORA"}
        (broken / "adapter_config.json").write_text(json.dumps(adapter))
        (broken / "model.safetensors").unlink()
        if not with_config:
            (broken / "config.json").unlink()
        with pytest.raises(ValueError, match=r"adapter of 'some/clip'.*merge_adapter"):
            load_encoder(broken)

    def test_no_image_processor(self, broken):
        for name in ("preprocessor_config.json", "processor_config.json"):
            (broken / name).unlink(missing_ok=True)
        with pytest.raises(ValueError, match="no image processor"):
            load_encoder(broken)

    def test_processor_of_another_resolution(self, broken):
        for path in broken.glob("*processor_config.json"):
            path.write_text(path.read_text().replace("32", "64"))
        with pytest.raises(ValueError, match=r"\(64, 64\).*32 px"):
            load_encoder(broken)

    def test_no_such_folder(self, tmp_path):
        with pytest.raises((ValueError, OSError), match="nothing-here"):
            load_encoder(tmp_path / "nothing-here")


def test_attack_mode_restores_nested_flags(encoder):
    encoder.train()
    encoder.vision_model.encoder.layers[0].eval()
    encoder.text_model.requires_grad_(False)
    modes = {name: module.training for name, module in encoder.named_modules()}
    needs = {name: p.requires_grad for name, p in encoder.named_parameters()}
    with pytest.raises(RuntimeError, match="mid-way"), attack_mode(encoder):
        assert not any(module.training for module in encoder.modules())
        assert not any(p.requires_grad for p in encoder.parameters())
        raise RuntimeError("mid-way")
    assert {name: module.training for name, module in encoder.named_modules()} == modes
    assert {name: p.requires_grad for name, p in encoder.named_parameters()} == needs
    assert len(set(modes.values())) == len(set(needs.values())) == 2


@torch.no_grad()
def test_text_bank_by_hand(encoder, stock, clip_folder):
    tokenizer = load_tokenizer(clip_folder)
    bank = make_text_bank(encoder, tokenizer, NAMES, TEMPLATES, batch_size=4)
    for row, name in enumerate(NAMES):
        units = []
        for template in TEMPLATES:
            tokens = tokenizer([template.format(name)], return_tensors="pt")
            pooled = stock.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
            text = stock.text_projection(pooled)[0]
            units.append(text / text.norm())
        mean = sum(units) / len(units)
        torch.testing.assert_close(bank.embeddings[row], mean / mean.norm())
    assert bank.logit_scale == pytest.approx(float(stock.logit_scale.exp()))
    embeds = encoder(IMAGES).image_embeds
    by_hand = bank.logit_scale * (embeds / embeds.norm(dim=1, keepdim=True)) @ bank.embeddings.T
    torch.testing.assert_close(bank.logits(embeds), by_hand)


@pytest.mark.parametrize(
    ("names", "templates", "said"),
    [
        (["one"], ["a {}"], "at least 2"),
        (["a", "b"], ["a photo"], "needs one"),
        (["a", "b"], [], "needs one"),
        (["a", "b"], ["a {} {}"], "needs one"),
    ],
)
def test_text_bank_refuses(encoder, clip_folder, names, templates, said):
    with pytest.raises(ValueError, match=said):
        make_text_bank(encoder, load_tokenizer(clip_folder), names, templates)


def test_names_that_stand_twice_are_said_and_kept(encoder, clip_folder):
    """As ImageNet's have them in CLIP_benchmark: no name moves, and both classes have one text."""
    with pytest.warns(UserWarning, match=r"\['a'\] stand more than once"):
        bank = make_text_bank(encoder, load_tokenizer(clip_folder), ["a", "photo", "a"], ["{}"])
    assert bank.class_names == ("a", "photo", "a")
    torch.testing.assert_close(bank.embeddings[0], bank.embeddings[2])


def test_template_hash_knows_names_templates_and_order(encoder, clip_folder):
    tokenizer = load_tokenizer(clip_folder)
    cases = [(NAMES, TEMPLATES), (NAMES[::-1], TEMPLATES), (NAMES, TEMPLATES[:1]), (NAMES, TEMPLATES[::-1])]
    hashes = {make_text_bank(encoder, tokenizer, *case).template_hash for case in cases}
    assert len(hashes) == 4


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(
    ("feature", "layer"),
    [
        ("pooled", -2),
        ("both", -2),
        ("patch_tokens", -2),
        ("patch_tokens", -1),
        ("patch_tokens", 1),
        ("patch_tokens", 0),
    ],
)
def test_freeze_unread_is_what_gradients_reach(encoder, processor, feature, layer, text):
    """Exactly the parameters with a gradient are trainable: one without breaks DDP, one frozen learns nothing."""
    reads = Reads(feature, layer, "encoder" if text else "none")
    freeze_unread(encoder, reads)
    chosen = {name for name, p in encoder.named_parameters() if p.requires_grad}
    encoder.requires_grad_(True)
    prompts = dict(processor.tokenizer(["a red", "a photo of a blue"], padding=True, return_tensors="pt"))
    output = encoder(IMAGES, prompts if text else None, **reads.asked())
    loss = output.text_embeds.square().sum() if text else 0.0
    if feature != "patch_tokens":
        loss = loss + output.image_embeds.pow(3).sum()
    if feature != "pooled":
        loss = loss + output.patch_tokens.pow(3).sum()
    loss.backward()
    assert chosen == {name for name, p in encoder.named_parameters() if p.grad is not None and (p.grad != 0).any()}


def test_unknown_feature():
    with pytest.raises(ValueError, match="unknown feature 'cls'.*'pooled'"):
        Reads("cls")


def test_reference_is_untouched_by_training(encoder):
    reference = Reference(encoder, Reads("both"))
    before = reference(IMAGES)
    assert not before.image_embeds.requires_grad
    encoder.train()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    encoder(IMAGES).image_embeds.sum().backward()
    optimizer.step()
    after = reference(IMAGES)
    assert torch.equal(after.image_embeds, before.image_embeds)
    assert torch.equal(after.patch_tokens, before.patch_tokens)
    assert not torch.allclose(encoder(IMAGES).image_embeds, before.image_embeds)
    assert not any(p.requires_grad for p in reference.encoder.parameters())


def test_weight_hash_sees_one_bit(encoder):
    before = weights_sha256(encoder)
    assert weights_sha256(copy.deepcopy(encoder)) == before
    with torch.no_grad():
        encoder.visual_projection.weight[0, 0] += 1e-4
    assert weights_sha256(encoder) != before
    assert tensor_sha256(torch.zeros(2)) != tensor_sha256(torch.zeros(2, dtype=torch.int32).float() + 1e-45)
    assert tensor_sha256(torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("layer", [-4, 3])
def test_a_layer_that_is_not_there_is_refused(encoder, layer):
    """The tiny tower has 2 layers, so 3 hidden states."""
    with pytest.raises(ValueError, match=f"token_layer={layer} is not there"):
        freeze_unread(encoder, Reads("patch_tokens", layer))


@pytest.fixture
def embedded(monkeypatch):
    """How many prompts each pass through a text tower embeds."""
    passes, embed = [], CLIPEncoder.encode_prompts
    monkeypatch.setattr(text_bank, "_MADE", {})

    def counted(model, tokens):
        passes.append(len(tokens["input_ids"]))
        return embed(model, tokens)

    monkeypatch.setattr(CLIPEncoder, "encode_prompts", counted)
    return passes


def test_a_text_bank_is_made_once(encoder, clip_folder, embedded):
    """findings-scale 9: four times in one run of TeCoA, whose text tower does not train."""
    tokenizer = load_tokenizer(clip_folder)
    first = make_text_bank(encoder, tokenizer, NAMES, TEMPLATES)
    with torch.no_grad():
        encoder.vision_model.post_layernorm.weight.mul_(2)  # as training does
    other = load_encoder(clip_folder)  # as a frozen copy is
    assert all(make_text_bank(model, tokenizer, NAMES, TEMPLATES) is first for model in (encoder, other))
    assert embedded == [len(NAMES) * len(TEMPLATES)]


def test_a_large_text_bank_is_read_from_disk_by_later_runs(encoder, clip_folder, embedded, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(text_bank, "_ON_DISK", len(NAMES) * len(TEMPLATES))
    tokenizer, made = load_tokenizer(clip_folder), []
    for run in range(4):
        monkeypatch.setattr(text_bank, "_MADE", {})  # as in a process of its own
        if run == 2:  # cut off: it is made again
            (file,) = (tmp_path / "hf_robust_vision" / "text_banks").iterdir()
            file.write_bytes(file.read_bytes()[:50])
        if run == 3:
            change_text_weight(encoder)
        made.append(make_text_bank(encoder, tokenizer, NAMES, TEMPLATES))
    assert len(embedded) == 3, "runs 0, 2 and 3"
    assert all(torch.equal(bank.embeddings, made[0].embeddings) for bank in made[:3])
    assert made[1].logit_scale == made[0].logit_scale
    assert not torch.equal(made[3].embeddings, made[0].embeddings)
    assert len(list((tmp_path / "hf_robust_vision" / "text_banks").iterdir())) == 2
    monkeypatch.setattr(text_bank, "_MADE", {})
    monkeypatch.setenv("HF_HOME", str(file / "no folder"))
    make_text_bank(encoder, tokenizer, NAMES, TEMPLATES)  # a cache that can not be written costs time only


def change_text_weight(model):
    with torch.no_grad():
        model.text_model.encoder.layers[1].mlp.fc1.weight[0, 0] += 1e-3


def change_scale(model):
    with torch.no_grad():
        model.logit_scale += 1


def change_activation(model):
    for layer in model.text_model.encoder.layers:
        layer.mlp.activation_fn = torch.nn.ReLU()


def change_token_that_is_read(model):
    model.config.text_config.eos_token_id = model.text_model.eos_token_id = 2


@pytest.mark.parametrize("change", [change_text_weight, change_scale, change_activation, change_token_that_is_read])
def test_a_text_bank_of_another_text_tower_is_made_anew(change, encoder, clip_folder, embedded):
    tokenizer = load_tokenizer(clip_folder)
    first = make_text_bank(encoder, tokenizer, NAMES, TEMPLATES)
    change(encoder)
    second = make_text_bank(encoder, tokenizer, NAMES, TEMPLATES)
    assert embedded == [9] * 2
    assert (first.logit_scale, first.embeddings.tolist()) != (second.logit_scale, second.embeddings.tolist())


def test_text_banks_of_other_texts_are_made_anew(encoder, clip_folder, embedded):
    tokenizer = load_tokenizer(clip_folder)
    cases = [(tokenizer, NAMES, TEMPLATES), (tokenizer, NAMES[::-1], TEMPLATES), (tokenizer, NAMES, TEMPLATES[:2])]
    banks = [make_text_bank(encoder, *case) for case in cases]
    assert len({id(bank) for bank in banks}) == 3
    assert [make_text_bank(encoder, *case) for case in cases] == banks
    for number in range(20):  # the newest are kept, and no more
        make_text_bank(encoder, tokenizer, (*NAMES, f"{number}"), TEMPLATES)
    assert len(text_bank._MADE) == 8
