"""A VLM hardened in place: from a folder of images without labels to its stock folder and its report."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, GitConfig, GitForCausalLM

from hf_robust_vision.cli import main
from hf_robust_vision.cli import main as cli
from hf_robust_vision.data.sources import ImageSource, load_labelled_images
from hf_robust_vision.evaluation.tasks import VLMProtocol
from hf_robust_vision.hub.release import prepare_release
from hf_robust_vision.methods.fare import FARETrainer
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.pipeline import harden_vlm as harden_module
from hf_robust_vision.pipeline import parse, run
from hf_robust_vision.pipeline.harden_vlm import VLMArguments, VLMTrainer, check_rest, harden_vlm
from hf_robust_vision.pipeline.measure_vlm import Asked, measure_vlm
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.vlm import LanguageReader
from tests.conftest import build_clip
from tests.towers.zoo import saved


RECIPE = Path(__file__).parents[2] / "recipes" / "harden_vlm.py"
SHORT = [
    "--max_steps",
    "3",
    "--per_device_train_batch_size",
    "2",
    "--attack_eps",
    "8/255",
    "--attack_steps",
    "2",
    "--learning_rate",
    "1e-3",
    "--report_to",
    "none",
    "--use_cpu",
    "true",
    "--save_strategy",
    "no",
    "--logging_steps",
    "1",
    "--disable_tqdm",
    "true",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six images in no class folders."""
    folder = tmp_path_factory.mktemp("photos")
    torch.manual_seed(0)
    for number in range(6):
        pixels = (torch.rand(20 + number, 30, 3) * 255).to(torch.uint8).numpy()
        place = folder / ("deep" if number % 2 else "")
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


@pytest.fixture
def vlm(tmp_path):
    """A tiny LLaVA."""
    saved("llava", tmp_path / "vlm")
    return tmp_path / "vlm"


def harden(vlm, photos, output, *more):
    words = ["--model_name_or_path", vlm, "--dataset_name", photos, "--output_dir", output, *SHORT, *more]
    return harden_vlm(*parse(VLMTrainer, list(map(str, words)), options=VLMArguments, name="harden-vlm"))


def tower_changed(before, after):
    """Names of the weights that differ between two folders."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert set(old) == set(new)
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm"])
def test_only_the_tower_changes(family, photos, tmp_path):
    saved(family, tmp_path / "vlm")
    more = ["--resolution", "32"] if family == "qwen3_vl" else []
    harden(tmp_path / "vlm", photos, tmp_path / "out", *more)
    changed = tower_changed(tmp_path / "vlm", tmp_path / "out")
    assert changed
    assert all("vision" in name or "visual" in name for name in changed)
    report = json.loads((tmp_path / "out" / "harden_report.json").read_text())
    assert report["changed"] > 0
    assert report["tower_sha256_before"] != report["tower_sha256_after"]
    assert report["training"]["feature"] == "language_tokens"
    assert report["training"]["steps"] == 3
    assert report["training"]["train_projector"] is False
    encoder = load_encoder(tmp_path / "out")
    assert weights_sha256(encoder.tower) == report["tower_sha256_after"]
    assert encoder.origin.rest_sha256(encoder) == report["rest_sha256"]


def test_a_language_model_that_changed_afterwards_is_refused(vlm, photos, tmp_path):
    """By the hash that the report holds; without a report it is another model, and is asked."""
    out = tmp_path / "out"
    harden(vlm, photos, out)
    asked, how = Asked(max_samples=1), VLMProtocol(eps=(8 / 255,), steps=1, restarts=1)
    check_rest(str(out))
    weights = load_file(out / "model.safetensors")
    name = next(name for name in weights if "language_model" in name and weights[name].ndim == 2)
    weights[name][0, 0] += 1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"weights beside tower and projector in .* are not those that its harden_rep"
    ):
        measure_vlm(str(out), asked, how, tmp_path / "results", progress=False)
    assert not list((tmp_path / "results").glob("*"))
    (out / "harden_report.json").unlink()
    check_rest(str(out))


def test_what_is_no_vlm_is_told_what_it_lacks(tmp_path):
    """A CLIP is sent to its own verb; a model that reads images without the hook is told of the hook."""
    how = VLMProtocol(eps=(8 / 255,), steps=1, restarts=1)
    with pytest.raises(ValueError, match=r"is a CLIPModel, no vision-language model; type evaluate for a CLIP"):
        measure_vlm("demo-clip", Asked(max_samples=1), how, tmp_path / "a", progress=False)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = GitConfig(vision_config=sizes | {"image_size": 32, "patch_size": 16}, vocab_size=64, **sizes)
    GitForCausalLM(config).save_pretrained(tmp_path / "git")
    with pytest.raises(ValueError, match=r"git \(GitForCausalLM\) has no get_image_features\(\)"):
        measure_vlm(str(tmp_path / "git"), Asked(max_samples=1), how, tmp_path / "b", progress=False)


def test_defaults_are_those_that_were_screened(tmp_path):
    args = VLMTrainer.args_class(output_dir=str(tmp_path))
    assert (args.feature, args.form, args.attack_steps) == ("language_tokens", "frozen", 2)


def test_a_stream_without_labels(vlm, photos, tmp_path):
    images = [{"image": Image.open(file).convert("RGB")} for file in sorted(photos.rglob("*.png"))]
    rows = datasets.Dataset.from_list(images, features=datasets.Features({"image": datasets.Image()}))
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    harden(vlm, tmp_path / "data", tmp_path / "out", "--streaming", "true")
    assert tower_changed(vlm, tmp_path / "out")


def test_the_projector_trains_if_asked(vlm, photos, tmp_path):
    harden(vlm, photos, tmp_path / "out", "--train_projector", "true")
    assert any("projector" in name for name in tower_changed(vlm, tmp_path / "out"))


def test_training_draws_attacked_tokens_to_the_original(vlm, photos, tmp_path):
    harden(vlm, photos, tmp_path / "out", "--max_steps", "60", "--learning_rate", "5e-3")
    report = json.loads((tmp_path / "out" / "harden_report.json").read_text())
    assert report["attacked_after"] < 0.8 * report["attacked_before"]


def test_an_adapter_ends_in_the_whole_vlm(vlm, photos, tmp_path):
    harden(vlm, photos, tmp_path / "out", "--use_peft", "true", "--lora_r", "4")
    changed = tower_changed(vlm, tmp_path / "out")
    assert changed
    assert all(name.startswith("vision_tower.encoder") and name.endswith("weight") for name in changed)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_a_run_goes_on_from_its_checkpoint(vlm, photos, tmp_path):
    harden(vlm, photos, tmp_path / "whole", "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4")
    part = tmp_path / "part"
    harden(vlm, photos, part, "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4")
    checkpoint = part / "checkpoint-2"
    assert "language_model" not in " ".join(load_file(checkpoint / "model.safetensors"))
    for name in ("model.safetensors", "harden_report.json"):
        (part / name).unlink()
    harden(vlm, photos, part, "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4",
           "--resume_from_checkpoint", checkpoint)  # fmt: skip
    assert tower_changed(part, tmp_path / "whole") == set()


def test_the_language_model_is_not_loaded(vlm, photos, tmp_path):
    encoder = load_encoder(vlm)
    assert not any("language_model" in name or "lm_head" in name for name in encoder.state_dict())


@pytest.mark.parametrize(
    ("words", "said"),
    [("--train_projector true", "--train_projector false"), ("--resolution 24", "--resolution 32")],
)
def test_a_run_does_not_go_on_as_another(vlm, photos, tmp_path, words, said):
    harden(vlm, photos, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "2")
    with pytest.raises(ValueError, match=f"was trained with {said}, and this run has {words}"):
        harden(vlm, photos, tmp_path / "out", "--resume_from_checkpoint", "true", *words.split())


def test_settings_of_a_dataset_that_is_not_named(vlm, tmp_path):
    words = ["--model_name_or_path", str(vlm), "--streaming", "true", "--output_dir", str(tmp_path / "out"), *SHORT]
    with pytest.raises(ValueError, match="streaming: settings of a dataset, but none is named"):
        harden_vlm(*parse(VLMTrainer, words, options=VLMArguments, name="harden-vlm"))


def test_a_language_model_that_changes_meanwhile(vlm, photos, tmp_path, monkeypatch):
    train = VLMTrainer.train

    def changed(self, **settings):
        output = train(self, **settings)
        weights = load_file(vlm / "model.safetensors")
        name = next(name for name in weights if name.startswith("language_model"))
        weights[name] = weights[name] + 1
        save_file(weights, vlm / "model.safetensors", metadata={"format": "pt"})
        return output

    monkeypatch.setattr(VLMTrainer, "train", changed)
    with pytest.raises(ValueError, match="weights beside tower and projector changed"):
        harden(vlm, photos, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_demo_is_asked_and_ready_to_be_published(tmp_path, monkeypatch, capsys):
    """Card, numbers and files; the card's own lines load it. What asking will cost is said before."""
    monkeypatch.setattr(harden_module, "PROBES", 4)
    words = [*SHORT, "--config", "harden_vlm_demo", "--output_dir", tmp_path / "out", "--num_questions", "2"]
    words += ["--test_steps", "2", "--test_restarts", "1", "--test_eps", "8/255", "--max_steps", "2"]
    results = harden_vlm(*parse(VLMTrainer, list(map(str, words)), options=VLMArguments, name="harden-vlm"))
    assert [result.model for result in results] == ["before", "after"]
    assert "to measure: 4 images x 4 attack steps over 1 radius = at most 16 passes, about" in capsys.readouterr().out
    release = prepare_release(tmp_path / "out", base_model="owner/demo-llava")
    assert release.kind == "vlm"
    assert {"config.json", "model.safetensors", "tokenizer.json", "harden_report.json"} <= set(release.files)
    card = release.card_for("owner/robust").decode()
    assert "A `LlavaForConditionalGeneration` made from" in card
    assert "pipeline_tag: image-text-to-text" in card
    code = re.search("```python\n(.*?)```", card, re.DOTALL)[1].replace("owner/robust", str(tmp_path / "out"))
    exec(code, {})

    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["multi_modal_projector.linear_1.bias"] += 1
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was measured on other weights"):
        prepare_release(tmp_path / "out", base_model="owner/demo-llava")


def test_the_verb_answers_a_machine(vlm, photos, tmp_path, capfd):
    """One JSON on the standard output; nothing was asked of a run on own images."""
    words = ["harden-vlm", vlm, "--dataset", photos, *SHORT, "--output_dir", tmp_path / "out", "--json"]
    assert cli([str(word) for word in words]) == 0
    assert json.loads(capfd.readouterr().out) == {"schema": 1, "output_dir": str(tmp_path / "out"), "results": []}


def test_what_was_not_measured_is_not_pushed(vlm, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(harden_module, "check_push", lambda args: None)
    with pytest.raises(ValueError, match="publishes measured models only"):
        harden(vlm, photos, tmp_path / "out", "--push_to_hub", "true")


class TestRefusals:
    def test_no_images(self, vlm, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="holds no images"):
            harden(vlm, tmp_path / "empty", tmp_path / "out")

    def test_a_corrupt_image(self, vlm, photos, tmp_path):
        folder = tmp_path / "photos"
        folder.mkdir()
        for image in photos.glob("*.png"):
            (folder / image.name).write_bytes(image.read_bytes())
        (folder / "broken.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match="broken.png"):
            harden(vlm, folder, tmp_path / "out")
        with pytest.warns(UserWarning, match="skipped 1 corrupt"):
            harden(vlm, folder, tmp_path / "out", "--skip_corrupt", "true")

    def test_another_feature(self, vlm, photos, tmp_path):
        with pytest.raises(ValueError, match="type --feature language_tokens, got pooled"):
            harden(vlm, photos, tmp_path / "out", "--feature", "pooled")

    def test_no_vlm(self, clip_folder, photos, tmp_path):
        with pytest.raises(ValueError, match=r"is no vision-language model; for a CLIP type .* --vlm NAME"):
            harden(clip_folder, photos, tmp_path / "out")

    def test_an_earlier_run_stays(self, vlm, photos, tmp_path):
        harden(vlm, photos, tmp_path / "out")
        with pytest.raises(ValueError, match="already holds a run"):
            harden(vlm, photos, tmp_path / "out")

    def test_nothing_is_there(self, photos, tmp_path):
        with pytest.raises(ValueError, match="no such folder"):
            harden(tmp_path / "vlm", photos, tmp_path / "out")


def test_the_verb_and_the_recipe(vlm, photos, tmp_path, monkeypatch, capsys):
    words = ["--dataset_name", str(photos), *SHORT]
    assert main(["harden-vlm", str(vlm), *words, "--output_dir", str(tmp_path / "verb")]) == 0
    assert "the whole VLM lies in" in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", [str(RECIPE), "--model_name_or_path", str(vlm), *words, "--output_dir", str(tmp_path / "recipe")]
    )
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert tower_changed(tmp_path / "verb", tmp_path / "recipe") == set()


class TestThroughAProjector:
    """A CLIP hardened at what the language model of a VLM will read of it."""

    @pytest.fixture
    def clip(self, vlm, tmp_path, processor):
        """A CLIP with the tower of the tiny LLaVA."""
        config = CLIPModel.config_class(
            vision_config=load_encoder(tmp_path / "vlm").config.vision_config.to_dict(),
            text_config=build_clip().config.text_config.to_dict(),
            projection_dim=16,
        )
        CLIPModel(config).save_pretrained(tmp_path / "clip")
        processor.save_pretrained(tmp_path / "clip")
        return tmp_path / "clip"

    def test_tokens_are_those_of_the_vlm_with_this_tower(self, vlm, clip):
        encoder = load_encoder(clip)
        reader = LanguageReader(str(vlm))
        encoder.read_by(reader)
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        whole = load_encoder(vlm)
        whole.tower.load_state_dict(encoder.vision_model.state_dict())
        with torch.no_grad():
            assert torch.equal(encoder(images, language_tokens=True).language_tokens, whole(images).language_tokens)
        assert not any("projector" in name for name in encoder.state_dict())

    def test_training_it_is_training_the_tower_in_place(self, vlm, clip, photos, tmp_path):
        """What is measured of one holds for the other: three updates of both end at the same weights."""
        whole, reader = load_encoder(vlm), LanguageReader(str(vlm))
        alone = load_encoder(clip)
        alone.vision_model.load_state_dict(whole.tower.state_dict())
        alone.read_by(reader)
        start = {name: value.clone() for name, value in whole.tower.state_dict().items()}
        images = load_labelled_images(ImageSource(photos, label_column=None), "train", whole.transform)
        settings = {"max_steps": 3, "per_device_train_batch_size": 2, "attack_eps": "8/255", "attack_steps": 2}
        settings |= {"learning_rate": 1e-3, "weight_decay": 1e-4, "max_grad_norm": 1.0, "feature": "language_tokens"}
        settings |= {"form": "frozen", "report_to": "none", "use_cpu": True, "save_strategy": "no"}
        for name, encoder in {"in place": whole, "alone": alone}.items():
            args = SimCLIPTrainer.args_class(output_dir=str(tmp_path / name), **settings)
            SimCLIPTrainer(model=encoder, args=args, train_dataset=images).train()
        there, here = whole.tower.state_dict(), alone.vision_model.state_dict()
        assert any(not torch.equal(there[name], value) for name, value in start.items())
        for name, value in there.items():
            torch.testing.assert_close(here[name], value, atol=1e-6, rtol=1e-5)

    def test_one_reader_for_two_towers(self, vlm, clip):
        """The first one goes on with its own tower."""
        reader, first, second = LanguageReader(str(vlm)), load_encoder(clip), load_encoder(clip)
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            first.read_by(reader)
            before = first(images, language_tokens=True).language_tokens
            second.vision_model.pre_layrnorm.weight.mul_(2)
            second.read_by(reader)
            assert torch.equal(first(images, language_tokens=True).language_tokens, before)
            assert not torch.equal(second(images, language_tokens=True).language_tokens, before)

    def test_another_tower_is_refused(self, vlm, clip_folder):
        with pytest.raises(ValueError, match="it could not be swapped in"):
            load_encoder(clip_folder).read_by(LanguageReader(str(vlm)))

    def test_without_a_vlm(self, clip_folder):
        with pytest.raises(ValueError, match="type --vlm NAME"):
            load_encoder(clip_folder)(torch.rand(1, 3, 32, 32), language_tokens=True)

    @pytest.mark.parametrize("trainer", [SimCLIPTrainer, FARETrainer])
    @pytest.mark.parametrize(
        ("feature", "distance"), [("language_tokens", "squared_l2"), ("language_and_patch_tokens", "cosine")]
    )
    def test_a_run(self, vlm, clip, image_folder, tmp_path, trainer, feature, distance):
        words = ["--measure", "false", "--validation_split", "validation", *SHORT]
        words += ["--feature", feature, "--token_distance", distance]
        words += ["--model_name_or_path", clip, "--dataset_name", image_folder, "--output_dir", tmp_path / "out"]
        run(trainer, *parse(trainer, list(map(str, [*words, "--vlm", vlm]))))
        old, new = (CLIPModel.from_pretrained(folder).state_dict() for folder in (clip, tmp_path / "out"))
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert changed
        assert all(name.startswith("vision_model.") for name in changed)

    @pytest.mark.parametrize(
        ("words", "said"),
        [("--feature language_tokens", "name it, --vlm NAME"), ("--vlm somewhere", "type --feature language_tokens")],
    )
    def test_half_of_it(self, clip_folder, image_folder, tmp_path, words, said):
        argv = [*words.split(), *SHORT, "--model_name_or_path", clip_folder, "--dataset_name", image_folder]
        argv += ["--output_dir", tmp_path / "out", "--validation_split", "validation"]
        with pytest.raises(ValueError, match=said):
            run(SimCLIPTrainer, *parse(SimCLIPTrainer, list(map(str, argv))))
