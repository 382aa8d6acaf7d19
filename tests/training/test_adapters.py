"""LoRA: what trains, what it is compared with, and what is saved."""

from __future__ import annotations

import copy
import shutil

import peft
import pytest
import torch
import transformers.integrations.peft
from transformers import CLIPConfig, CLIPModel, LlavaConfig, LlavaForConditionalGeneration

from hf_robust_vision import (
    AGFTTrainer,
    FARETrainer,
    PMGAFTTrainer,
    SimCLIPTrainer,
    TeCoATrainer,
    TIMATrainer,
    as_encoder,
    load_encoder,
    merge_adapter,
    swap_vision_encoder,
)
from hf_robust_vision.hub.card import is_hub_id
from hf_robust_vision.pipeline import parse, run
from hf_robust_vision.towers.adapters import add_adapter, has_adapter
from hf_robust_vision.towers.base import Reads, attack_mode, freeze_unread, weights_sha256
from tests.training.helpers import largest_gap, make_trainer, weights


TRAINERS = (SimCLIPTrainer, FARETrainer, TeCoATrainer, AGFTTrainer, PMGAFTTrainer, TIMATrainer)
LORA = {"use_peft": True, "lora_r": 2, "lora_alpha": 4, "learning_rate": 1e-2}


def trainable(trainer):
    return {name for name, p in trainer.model.named_parameters() if p.requires_grad}


def towers(names):
    return {name.split(".")[0] for name in names}


def stock(state):
    """Weights of the network without its adapter, under their own names."""
    return {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}


@pytest.mark.parametrize("kind", TRAINERS, ids=lambda kind: kind.__name__)
def test_only_the_vision_adapter_trains(kind, clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, kind=kind, max_steps=2, **LORA)
    before = weights(trainer)
    assert all(".lora_" in name for name in trainable(trainer))
    assert towers(trainable(trainer)) == {"vision_model", "visual_projection"}
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trainable(trainer)
    assert largest_gap(stock(after), load_encoder(clip_folder).state_dict()) == 0


def test_transformers_is_not_asked_for_adapters(clip_folder, tmp_path, monkeypatch):
    """findings-journey 1: its own functions refuse every peft that it does not know, the newest among them."""

    def refuse(*args, **kwargs):
        raise ValueError("the version of PEFT is not compatible")

    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", refuse)
    settings = LORA | {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "gradient_checkpointing": True}
    make_trainer(clip_folder, tmp_path, **settings).train()
    trainer = make_trainer(clip_folder, tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer.save_model(str(tmp_path / "model"))
    gap = largest_gap(
        merge_adapter(tmp_path / "model" / "adapter").state_dict(), load_encoder(tmp_path / "model").state_dict()
    )
    assert gap < 1e-6


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.IA3Config, peft.LoHaConfig])
def test_an_adapter_is_seen_however_it_came_in(config, clip_folder):
    """By its layers: whatever the kind, whoever put it there, wrapped or not."""
    model = CLIPModel.from_pretrained(clip_folder)
    assert not has_adapter(model)
    options = {"feedforward_modules": []} if config is peft.IA3Config else {}
    wrapped = peft.get_peft_model(model, config(target_modules=["q_proj"], **options))
    assert has_adapter(wrapped)
    assert has_adapter(wrapped.get_base_model().vision_model)
    assert not has_adapter(wrapped.unload())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("encoder", {"text_model", "text_projection"}), ("projection", {"text_projection"}), ("none", set())],
)
def test_tima_adapts_text_only_when_asked(text, wanted, clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, kind=TIMATrainer, max_steps=2, text_params=text, **LORA)
    before = weights(trainer)
    assert towers(trainable(trainer)) - {"vision_model", "visual_projection"} == wanted
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved == trainable(trainer)


def test_adapters_are_where_the_loss_reads(clip_folder, tmp_path):
    """A block that the loss does not read, or that is frozen, gets none: its gradient would be missing or unwanted."""
    read = make_trainer(clip_folder, tmp_path, feature="patch_tokens", **LORA)
    assert {name.split(".layers.")[1][0] for name in trainable(read)} == {"0"}
    late = make_trainer(clip_folder, tmp_path, freeze_blocks=1, **LORA)
    assert {name.split(".layers.")[1][0] for name in trainable(late) if "layers" in name} == {"1"}
    some = make_trainer(clip_folder, tmp_path, lora_target_modules=["q_proj", "fc2"], **LORA)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(some)} == {"q_proj", "fc2"}


def test_names_that_are_not_there(clip_folder, tmp_path):
    with pytest.raises(ValueError, match=r"\['query'\] are no linear layers .*'q_proj'"):
        make_trainer(clip_folder, tmp_path, lora_target_modules=["query", "q_proj"], **LORA)
    with pytest.raises(ValueError, match=r"\['text_projection'\] are no linear layers that would train"):
        make_trainer(clip_folder, tmp_path, lora_target_modules=["text_projection"], **LORA)
    with pytest.raises(ValueError, match="nothing to adapt"):
        make_trainer(clip_folder, tmp_path, feature="patch_tokens", token_layer=0, **LORA)


def test_the_reference_is_the_base_itself(clip_folder, tmp_path):
    """Features of a frozen copy, bit for bit, and not a byte of weights beside those that train."""
    trainer = make_trainer(clip_folder, tmp_path, feature="both", max_steps=2, **LORA)
    frozen = load_encoder(clip_folder).eval()
    held = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    assert {p.untyped_storage().data_ptr() for p in trainer.reference.encoder.parameters()} <= held
    trainer.train()
    assert {p.untyped_storage().data_ptr() for p in trainer.reference.encoder.parameters()} <= held
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        wanted = frozen(images, token_layer=-2)
        assert not torch.allclose(trainer.model(images).image_embeds, wanted.image_embeds)
    for key, value in trainer.reference(images).items():
        assert torch.equal(value, wanted[key])
    assert weights_sha256(trainer.reference.encoder) == weights_sha256(frozen)


def test_a_new_adapter_changes_nothing_and_follows_the_seed_alone(clip_folder, tmp_path):
    torch.manual_seed(1)
    one = make_trainer(clip_folder, tmp_path, seed=3, **LORA)
    torch.manual_seed(2)
    two = make_trainer(clip_folder, tmp_path, seed=3, **LORA)
    other = make_trainer(clip_folder, tmp_path, seed=4, **LORA)
    assert largest_gap(weights(one), weights(two)) == 0
    assert largest_gap(weights(one), weights(other)) > 0
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(one.model(images).image_embeds, load_encoder(clip_folder)(images).image_embeds)


def test_dropout_is_off_in_the_attack(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, lora_dropout=0.5, max_steps=2, **LORA)
    trainer.train()
    trainer.model.train()
    images = torch.rand(2, 3, 32, 32)
    with attack_mode(trainer.model):
        assert torch.equal(trainer.model(images).image_embeds, trainer.model(images).image_embeds)
        assert not trainable(trainer)
    assert not torch.equal(trainer.model(images).image_embeds, trainer.model(images).image_embeds)
    assert all(".lora_" in name for name in trainable(trainer))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resume_is_bit_equal(dropout, clip_folder, tmp_path):
    settings = LORA | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lora_dropout": dropout}
    whole = make_trainer(clip_folder, tmp_path, **settings)
    whole.train()
    folder = tmp_path / "checkpoint-3"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    again = make_trainer(clip_folder, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(folder))
    assert largest_gap(weights(again), weights(whole)) == 0


def test_resume_with_and_without_adapter_do_not_mix(clip_folder, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(clip_folder, tmp_path / "lora", **settings, **LORA).train()
    make_trainer(clip_folder, tmp_path / "full", **settings).train()
    full, lora = make_trainer(clip_folder, tmp_path, max_steps=3), make_trainer(clip_folder, tmp_path, **LORA)
    with pytest.raises(ValueError, match="go on with .*--use_peft true"):
        full.train(resume_from_checkpoint=str(tmp_path / "lora" / "checkpoint-1"))
    with pytest.raises(ValueError, match="go on with .*--use_peft false"):
        lora.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-1"))


@pytest.mark.parametrize("other", [{"lora_r": 4}, {"lora_target_modules": ["q_proj"]}], ids=["rank", "layers"])
def test_resume_with_another_adapter_is_refused(other, saved, clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path / "other", **(LORA | other))
    before = weights(trainer)
    with pytest.raises(ValueError, match="of another rank or of other layers; go on with the lora_r"):
        trainer._load_from_checkpoint(str(saved[1] / "adapter"))
    assert largest_gap(weights(trainer), before) == 0


def test_the_best_checkpoint_is_loaded(clip_folder, tmp_path):
    settings = LORA | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "robust_accuracy", "eval_steps": 1}
    trainer = make_trainer(clip_folder, tmp_path, **settings, **best)
    scores = iter([1.0, 0.0, 0.0])
    metrics = trainer.evaluate

    def evaluate(*args, **kwargs):
        return metrics(*args, **kwargs) | {"eval_robust_accuracy": next(scores)}

    trainer.evaluate = evaluate
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    once = make_trainer(clip_folder, tmp_path / "once", **(settings | {"eval_strategy": "no"}))
    once.train()
    once._load_from_checkpoint(str(tmp_path / "once" / "checkpoint-1"))
    assert largest_gap(weights(trainer), weights(once)) == 0


@pytest.fixture
def saved(clip_folder, tmp_path):
    """A trained adapter, and the folder of `save_model`."""
    trainer = make_trainer(clip_folder, tmp_path / "run", **LORA)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    return trainer, tmp_path / "model"


def test_a_saved_model_is_a_stock_clip(saved, clip_folder):
    trainer, folder = saved
    model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.architectures == ["CLIPModel"]
    assert weights_sha256(trainer.hardened_encoder()) == weights_sha256(model)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    live = trainer.model.double().eval()(images).image_embeds
    torch.testing.assert_close(load_encoder(folder).double()(images).image_embeds, live, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(load_encoder(clip_folder).double()(images).image_embeds, live, atol=1e-3)
    assert all(".lora_" in name for name in trainable(trainer))  # saving left the live model as it was


def test_saving_a_compiled_model_under_autocast(clip_folder, tmp_path):
    """The merged copy is free of what accelerate and the compiler put around the live model."""
    speed = {"bf16": True, "torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1}
    trainer = make_trainer(clip_folder, tmp_path, **LORA, **speed)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    merged = trainer.hardened_encoder()
    images = torch.rand(2, 3, 32, 32)
    assert merged.encode_images(images).image_embeds.dtype == torch.float32
    assert weights_sha256(CLIPModel.from_pretrained(tmp_path / "model")) == weights_sha256(merged)
    torch._dynamo.reset()


def test_the_recipe_measures_what_it_saves(clip_folder, image_folder, tmp_path):
    """Before: the base without the adapter; after: the merged model of the folder."""
    text = f"""--model_name_or_path {clip_folder} --dataset_name {image_folder} --output_dir {tmp_path / "out"}
    --validation_split validation --max_steps 2 --per_device_train_batch_size 4 --attack_steps 2 --test_steps 2
    --test_eps 1/255 --attack_eps 1/255 --report_to none --use_cpu true --templates demo --save_strategy no
    --disable_tqdm true --use_peft true --lora_r 2 --learning_rate 1e-2"""
    before, after = run(SimCLIPTrainer, *parse(SimCLIPTrainer, text.split()))
    assert before.model_sha256 == weights_sha256(load_encoder(clip_folder))
    assert after.model_sha256 == weights_sha256(load_encoder(tmp_path / "out")) != before.model_sha256
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert after.training["lora_r"] == 2
    assert after.training["lora_target_modules"] == "all"


def test_the_adapter_beside_it_is_a_peft_folder(saved, clip_folder):
    _, folder = saved
    config = peft.PeftConfig.from_pretrained(folder / "adapter")
    assert config.base_model_name_or_path == str(clip_folder)
    assert not (folder / "adapter" / "config.json").exists()
    model = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder), folder / "adapter")
    merged = model.merge_and_unload().state_dict()
    assert largest_gap(merged, CLIPModel.from_pretrained(folder).state_dict()) < 1e-6
    size = {
        part: (folder / part).stat().st_size for part in ("model.safetensors", "adapter/adapter_model.safetensors")
    }
    held = sum(value.nbytes for name, value in saved[0].model.state_dict().items() if ".lora_" in name)
    assert held < size["adapter/adapter_model.safetensors"] < held + 8_000
    assert size["adapter/adapter_model.safetensors"] < size["model.safetensors"] / 4


def test_an_adapter_of_vit_b_32_is_one_percent(tmp_path):
    with torch.device("meta"):
        encoder = as_encoder(CLIPModel(CLIPConfig(vision_config={"patch_size": 32})))
    freeze_unread(encoder, Reads())
    whole = encoder.num_parameters()
    add_adapter(encoder, rank=8, alpha=16, dropout=0.0, target_modules=None, seed=0)
    share = encoder.num_parameters(only_trainable=True) / whole
    in_a_block = 4 * 2 * 768 * 8 + 2 * (768 + 3072) * 8
    assert share == (12 * in_a_block + (768 + 512) * 8) / whole
    assert 0.008 < share < 0.01


def test_swap_from_what_the_trainer_saved(saved, clip_folder):
    _, folder = saved
    vision = CLIPModel.from_pretrained(clip_folder).config.vision_config
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 64}
    vlm = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=60))
    merged = CLIPModel.from_pretrained(folder).vision_model.state_dict()
    for source in (folder / "adapter", folder):
        report = swap_vision_encoder(vlm, source)
        assert largest_gap(vlm.model.vision_tower.state_dict(), merged) < 1e-6
        report.restore()


def test_a_local_original_is_no_hub_id_from_elsewhere(clip_folder, tmp_path, monkeypatch):
    """Trained from "runs/clip" and pushed from another folder: the record still names this machine's folder."""
    shutil.copytree(clip_folder, tmp_path / "runs" / "clip")
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer("runs/clip", tmp_path / "run", **LORA)
    trainer.save_model(str(tmp_path / "model"))
    config = peft.PeftConfig.from_pretrained(tmp_path / "model" / "adapter")
    assert config.base_model_name_or_path == str(tmp_path / "runs" / "clip")
    monkeypatch.chdir(tmp_path / "model")
    assert not is_hub_id(config.base_model_name_or_path)


def test_merge_adapter(saved, clip_folder, tmp_path):
    _, folder = saved
    wanted = CLIPModel.from_pretrained(folder).state_dict()
    base = CLIPModel.from_pretrained(clip_folder)
    before = weights_sha256(base)
    for given in (None, clip_folder, base):
        merged = merge_adapter(folder / "adapter", base=given)
        assert largest_gap(merged.state_dict(), wanted) < 1e-6
    assert weights_sha256(base) == before
    merged.save_pretrained(tmp_path / "again")
    assert largest_gap(CLIPModel.from_pretrained(tmp_path / "again").state_dict(), wanted) < 1e-6


def test_merge_adapter_refuses(saved, clip_folder, tmp_path):
    trainer, folder = saved
    other = copy.deepcopy(CLIPModel.from_pretrained(clip_folder).config)
    other.vision_config.intermediate_size = 48
    with pytest.raises(ValueError, match="does not fit CLIPEncoder"):
        merge_adapter(folder / "adapter", base=CLIPModel(other))
    with pytest.raises(ValueError, match="holds an adapter already"):
        SimCLIPTrainer(trainer.model, trainer.args)
    trainer.model.peft_config["default"].base_model_name_or_path = None
    trainer.model.save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match="pass base="):
        merge_adapter(tmp_path / "nameless")


def test_gradient_checkpointing_equals_none(clip_folder, tmp_path):
    plain = make_trainer(clip_folder, tmp_path / "a", double=True, **LORA)
    plain.train()
    saving = make_trainer(clip_folder, tmp_path / "b", double=True, gradient_checkpointing=True, **LORA)
    saving.train()
    assert largest_gap(weights(plain), weights(saving)) < 1e-12


def test_an_adapter_of_a_model_in_memory(clip_folder, tmp_path):
    """A stock CLIPModel handed to the trainer keeps its class and gets the adapter."""
    model = CLIPModel.from_pretrained(clip_folder)
    assert as_encoder(model) is not model
    trainer = make_trainer(clip_folder, tmp_path, **LORA)
    trainer = SimCLIPTrainer(model, trainer.args, train_dataset=trainer.train_dataset)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    named = peft.PeftConfig.from_pretrained(tmp_path / "model" / "adapter").base_model_name_or_path
    assert named == str(clip_folder)
