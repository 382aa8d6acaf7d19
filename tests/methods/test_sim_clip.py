"""Training on the tiny model: what moves, what stays, what is logged, and the exactness of the loop."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPModel, CLIPVisionModelWithProjection, TrainerCallback

from hf_robust_vision.attacks import LinfBall, StartNoise
from hf_robust_vision.methods.features import detached
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.methods.tecoa import TeCoATrainer
from hf_robust_vision.towers.base import EncoderOutput
from hf_robust_vision.towers.load import as_encoder, load_encoder
from hf_robust_vision.training import base
from hf_robust_vision.training.base import AdversarialTrainer, Batch
from hf_robust_vision.training.collapse import CollapseError
from tests.conftest import make_dataset
from tests.towers.test_clip import vision_folder
from tests.training.helpers import SGD, arguments, largest_gap, make_trainer, weights


@pytest.mark.parametrize("form", ["anchored", "frozen", "paper"])
@pytest.mark.parametrize("feature", ["pooled", "patch_tokens", "both"])
def test_what_moves_and_what_stays(form, feature, clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, form=form, feature=feature, on_collapse="record", **SGD)
    before, original = weights(trainer), {k: v.clone() for k, v in trainer.reference.encoder.state_dict().items()}
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    # The softmax does not see a shift of all keys, so their bias has a gradient of rounding only.
    silent = {name for name in trainable if "k_proj.bias" in name}
    assert trainable - silent <= moved <= trainable
    assert "vision_model.embeddings.patch_embedding.weight" in moved
    assert not any(name.startswith("text_") or name == "logit_scale" for name in moved)
    assert ("visual_projection.weight" in moved) == (feature != "patch_tokens")
    assert ("vision_model.encoder.layers.1.mlp.fc1.weight" in moved) == (feature != "patch_tokens")
    assert all(torch.equal(value, original[name]) for name, value in trainer.reference.encoder.state_dict().items())


@pytest.mark.parametrize("distance", ["cosine", "squared_l2"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack_goes_up_and_stays_inside(norm, distance, clip_folder, tmp_path):
    eps = 1 / 255 if norm == "linf" else 0.2
    settings = {"attack_norm": norm, "attack_eps": eps, "attack_distance": distance}
    trainer = make_trainer(clip_folder, tmp_path, form="frozen", **settings)
    seen = []
    trainer.robust_loss = lambda model, batch, adversarial: (
        seen.append((batch, adversarial)) or SimCLIPTrainer.robust_loss(trainer, model, batch, adversarial)
    )
    trainer.train()
    ball = trainer.args.attack_ball()
    assert len(seen) == 3
    for batch, adversarial in seen:
        assert (ball.distance(adversarial, batch.images) <= eps * (1 + 1e-5)).all()
        assert not adversarial.requires_grad
    gains = [row["attack_gain"] for row in trainer.state.log_history if "attack_gain" in row]
    assert len(gains) == 3
    assert all(gain > 0 for gain in gains)


def test_attack_runs_in_eval_mode_without_parameter_gradients_and_the_loss_does_not(
    clip_folder, tmp_path, monkeypatch
):
    trainer = make_trainer(clip_folder, tmp_path)
    seen = []

    def watch(name):
        original = getattr(SimCLIPTrainer, name)

        def watched(self, encoder, *rest):
            seen.append((name, encoder.training, any(p.requires_grad for p in encoder.parameters())))
            return original(self, encoder, *rest)

        monkeypatch.setattr(SimCLIPTrainer, name, watched)

    watch("attack_objective")
    watch("robust_loss")
    trainer.train()
    assert seen == [("attack_objective", False, False), ("robust_loss", True, True)] * 3


@pytest.mark.parametrize("form", ["anchored", "frozen", "paper"])
def test_objective_aims_away_from_the_embedding_that_the_form_names(form, clip_folder, tmp_path):
    """`paper` runs against the tuned model's own clean embedding, the others against the original's."""
    trainer = make_trainer(clip_folder, tmp_path, form=form)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in trainer.model.vision_model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        original, own = trainer.reference(images), detached(trainer.model(images))
        target = own if form == "paper" else original
        batch = Batch(images, torch.tensor([0, 1]), torch.tensor([0, 1]), lambda images, ids: original)
        other = torch.rand(2, 3, 32, 32)
        wanted = 1 - torch.cosine_similarity(trainer.model(other).image_embeds, target.image_embeds)
        torch.testing.assert_close(trainer.attack_objective(trainer.model, batch)(other), wanted)


@pytest.mark.parametrize("form", ["anchored", "frozen", "paper"])
def test_loss_of_each_form_by_hand(form, clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, form=form, anchor_weight=0.7)
    table = torch.tensor([[1.0, 0.0], [3.0, 4.0]], requires_grad=True)  # the clean image's and the adversarial one's

    def model(images, token_layer=None):
        return EncoderOutput(image_embeds=table if len(images) == 2 else table[1:])

    original = EncoderOutput(image_embeds=torch.tensor([[0.0, 1.0]]))
    batch = Batch(torch.zeros(1, 3, 32, 32), torch.tensor([0]), torch.tensor([0]), lambda images, ids: original)
    loss = trainer.robust_loss(model, batch, torch.ones(1, 3, 32, 32))
    wanted = {"paper": 0.4, "frozen": 0.2, "anchored": 0.4 + 0.7 * 1.0}[form]
    assert loss.item() == pytest.approx(wanted)
    loss.backward()
    clean_gradient = {  # of (1, 0): half of -(0.6, 0.8) + 0.6 (1, 0), and 0.7 of -(0, 1)
        "paper": [0.0, -0.4],
        "frozen": [0.0, 0.0],
        "anchored": [0.0, -0.4 - 0.7],
    }[form]
    torch.testing.assert_close(table.grad[0], torch.tensor(clean_gradient))


def test_token_layer_zero_is_not_the_default(clip_folder, tmp_path):
    """Layer 0 is the patch embedding: no transformer layer is read, so none may be trained."""
    trainer = make_trainer(clip_folder, tmp_path, feature="patch_tokens", token_layer=0)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert not any(".layers." in name for name in trainable)
    trainer.train()


def test_speed_is_that_of_the_training(clip_folder, tmp_path, monkeypatch):
    """A measurement between construction and training does not count."""
    trainer = make_trainer(clip_folder, tmp_path)
    trainer._seen_at -= 1000
    trainer.train()
    assert trainer.state.log_history[0]["samples_per_second"] > 1


def test_noise_follows_sample_and_step(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, seed=5)
    trainer.state.global_step = 9
    batch = Batch(torch.rand(2, 3, 32, 32), torch.zeros(2), torch.tensor([4, 8]), trainer.targets)
    ball = LinfBall(1 / 255)
    started = []

    def flat(images):
        started.append(images.detach().clone())
        return (images * 0).flatten(1).sum(1)

    trainer.attack(flat, batch)
    noise = StartNoise(5, [4, 8], 9).draw(batch.images)
    assert torch.equal(started[0], ball.start(batch.images, noise))
    trainer.args.attack_random_start = False
    trainer.attack(flat, batch)
    assert torch.equal(started[-1], batch.images)


@pytest.mark.parametrize("form", ["anchored", "frozen"])
@pytest.mark.parametrize("feature", ["pooled", "both"])
def test_accumulation_1x8_equals_8x1(form, feature, clip_folder, tmp_path):
    """In float64, with labels in the batch (which make `Trainer` skip its division by the accumulation steps)."""
    shared = SGD | {"form": form, "feature": feature, "double": True, "max_steps": 2}
    whole = make_trainer(clip_folder, tmp_path, per_device_train_batch_size=8, **shared)
    parts = make_trainer(clip_folder, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, **shared)
    start = weights(whole)
    for trainer in (whole, parts):
        trainer.train()
    assert largest_gap(weights(whole), start) > 1e-6
    assert largest_gap(weights(whole), weights(parts)) < 1e-10
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_gradient_checkpointing_equals_none(clip_folder, tmp_path):
    trainers = [
        make_trainer(clip_folder, tmp_path, double=True, feature="both", gradient_checkpointing=on, **SGD)
        for on in (False, True)
    ]
    for trainer in trainers:
        trainer.train()
    assert trainers[1].model.is_gradient_checkpointing
    assert largest_gap(*map(weights, trainers)) < 1e-10


def test_bf16_runs_and_learns_about_the_same(clip_folder, tmp_path):
    trainers = [make_trainer(clip_folder, tmp_path, bf16=on, feature="both", **SGD) for on in (False, True)]
    start = weights(trainers[0])
    for trainer in trainers:
        trainer.train()
        assert all(value.dtype == torch.float32 for value in weights(trainer).values())
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    moves = [weights(trainer)[name] - start[name] for trainer in trainers]
    assert torch.cosine_similarity(moves[0].flatten(), moves[1].flatten(), dim=0) > 0.5
    gains = [[row["attack_gain"] for row in t.state.log_history if "attack_gain" in row] for t in trainers]
    assert sum(gains[1]) > 0.7 * sum(gains[0])  # low precision must not mean a weak attack


def test_logged_keys(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    wanted = {"cosine_to_original", "pairwise_cosine", "attack_loss", "attack_gain", "samples_per_second"}
    assert wanted <= set(row)
    assert row["cosine_to_original"] == pytest.approx(1, abs=1e-4)  # the first step measures the untouched model
    later = [row["cosine_to_original"] for row in trainer.state.log_history if "loss" in row][-1]
    assert later < row["cosine_to_original"]


def test_evaluate_reports_clean_and_robust_accuracy(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path)
    before = weights(trainer)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_robust_accuracy"] <= metrics["eval_clean_accuracy"] <= 1
    assert metrics["eval_clean_accuracy"] * 9 == pytest.approx(round(metrics["eval_clean_accuracy"] * 9))
    assert largest_gap(before, weights(trainer)) == 0
    assert set(trainer.evaluate(metric_key_prefix="test")) >= {"test_robust_accuracy"}
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate()


def test_best_robust_checkpoint_is_loaded_at_the_end(clip_folder, tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.4])

    def pretend(*args, **settings):
        return [SimpleNamespace(eps=1 / 255, clean_accuracy=1.0, robust_accuracy=next(scores), seconds=0.0)]

    monkeypatch.setattr(base, "evaluate_zero_shot", pretend)
    each = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "robust_accuracy", "save_total_limit": 1}
    trainer = make_trainer(clip_folder, tmp_path, **each, **best)
    trainer.train()
    assert trainer.state.best_metric == 0.9
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = CLIPModel.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert largest_gap(weights(trainer), saved) == 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_checkpoints_are_stock_folders(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["CLIPModel"]
    model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert largest_gap(dict(model.state_dict()), weights(trainer)) == 0
    assert load_encoder(folder).transform == trainer.model.transform


class TestCollapse:
    """The paper's form at a rate at which everything becomes one point."""

    @staticmethod
    def collapsing(clip_folder, output_dir, **changes):
        """Training that pulls all embeddings to one point, faster than any loss would."""

        class Collapser(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                if state.global_step == 3:
                    with torch.no_grad():
                        model.vision_model.post_layernorm.weight.mul_(1e-4)
                        model.vision_model.post_layernorm.bias.add_(1.0)

        return make_trainer(clip_folder, output_dir, callbacks=[Collapser()], max_steps=6, **changes)

    def test_stops_and_names_the_last_good_checkpoint(self, clip_folder, tmp_path):
        trainer = self.collapsing(clip_folder, tmp_path, form="paper", save_strategy="steps", save_steps=1)
        with pytest.raises(CollapseError, match=r"type --form anchored.*checkpoint-2") as caught:
            trainer.train()
        assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
        assert not (tmp_path / "checkpoint-3").exists(), "a collapsed model must not be saved as a good one"
        assert "step 3" in str(caught.value)

    def test_the_advice_is_the_methods_own(self, clip_folder, tmp_path):
        """TeCoA has no `--form` (findings-code 6)."""
        with pytest.raises(CollapseError, match="type a smaller --learning_rate") as caught:
            self.collapsing(clip_folder, tmp_path, kind=TeCoATrainer).train()
        assert "form" not in str(caught.value)

    def test_record_goes_on(self, clip_folder, tmp_path):
        trainer = self.collapsing(clip_folder, tmp_path, form="paper", on_collapse="record")
        with pytest.warns(UserWarning, match="collapsed"):
            trainer.train()
        assert trainer.state.global_step == 6
        pairwise = [row["pairwise_cosine"] for row in trainer.state.log_history if "pairwise_cosine" in row]
        assert pairwise[-1] > 0.99 > pairwise[0]

    def test_one_image_a_step_is_warned_about(self, clip_folder, tmp_path):
        """There is no pair to compare."""
        with pytest.warns(UserWarning, match="a collapse of the embeddings goes unseen"):
            make_trainer(clip_folder, tmp_path, per_device_train_batch_size=1)

    def test_paper_form_at_a_high_rate_collapses_and_the_others_do_not(self, clip_folder, tmp_path):
        fast = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "constant", "max_steps": 60}
        fast |= {"logging_steps": 2, "attack_steps": 1, "attack_eps": "8/255"}
        with pytest.raises(CollapseError):
            make_trainer(clip_folder, tmp_path, form="paper", **fast).train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_trainer(clip_folder, tmp_path, form="frozen", **(fast | {"learning_rate": 1e-3})).train()


class TestWeightsThatAreNoNumbers:
    """Findings-reliability 3 and 9: never trained on, never saved, never called good."""

    @staticmethod
    def breaking(clip_folder, output_dir, step, **changes):
        class Breaker(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                if state.global_step == step:
                    with torch.no_grad():
                        model.visual_projection.weight[0, 0] = float("nan")

        return make_trainer(clip_folder, output_dir, callbacks=[Breaker()], on_collapse="record", **changes)

    @pytest.mark.parametrize("name", ["logit_scale", "text_projection.weight", "vision_model.post_layernorm.bias"])
    def test_such_a_model_is_not_trained(self, name, clip_folder, tmp_path):
        encoder = load_encoder(clip_folder)
        with torch.no_grad():
            encoder.get_parameter(name).fill_(float("inf"))
        with pytest.raises(ValueError, match=f"model to start from holds NaN or infinity in {name}"):
            SimCLIPTrainer(model=encoder, args=arguments(tmp_path), train_dataset=make_dataset(6))

    def test_no_checkpoint_of_them_is_written(self, clip_folder, tmp_path):
        trainer = self.breaking(clip_folder, tmp_path, 2, logging_steps=50, save_strategy="steps", save_steps=1)
        with pytest.raises(ValueError, match=r"not finite after step 2;.*Last good checkpoint: .*checkpoint-1\."):
            trainer.train()
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]

    def test_a_run_does_not_end_well_with_them(self, clip_folder, tmp_path):
        with pytest.raises(ValueError, match="not finite after step 3;.*Last good checkpoint: None"):
            self.breaking(clip_folder, tmp_path, 3, logging_steps=50).train()


class TestConstruction:
    def test_normalised_images_stop_before_the_first_update(self, clip_folder, tmp_path):
        class Normalised(torch.utils.data.Dataset):
            def __len__(self):
                return 6

            def __getitem__(self, index):
                item = make_dataset(6)[index]
                return item | {"images": (item["images"] - 0.5) / 0.25}

        trainer = make_trainer(clip_folder, tmp_path, train=Normalised())
        before = weights(trainer)
        with pytest.raises(ValueError, match="do_normalize=False"):
            trainer.train()
        assert largest_gap(before, weights(trainer)) == 0

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"optim": "adamw_anyprecision"}, "--optim adamw_anyprecision .*torchdistx"),
            ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr.*min_lr"),
            ({"dataloader_drop_last": True, "per_device_train_batch_size": 25}, "no update would be made.* 24 images"),
        ],
    )
    def test_what_could_not_make_an_update_is_refused_at_once(self, changes, said, clip_folder, tmp_path):
        """Findings-reliability 1 and 8."""
        with pytest.raises(ValueError, match=said):
            make_trainer(clip_folder, tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()

    def test_a_whole_batch_that_is_not_dropped_is_an_update(self, clip_folder, tmp_path):
        trainer = make_trainer(
            clip_folder, tmp_path, dataloader_drop_last=True, per_device_train_batch_size=24, max_steps=1
        )
        trainer.train()
        assert trainer.state.global_step == 1

    def test_a_run_without_an_update_is_an_error(self, clip_folder, tmp_path):
        """Whatever the reason: here a callback that stops before the first step."""

        class Stop(TrainerCallback):
            def on_epoch_begin(self, args, state, control, **kwargs):
                control.should_training_stop = True

            def on_step_begin(self, args, state, control, **kwargs):
                pytest.fail("a step was taken")

        trainer = make_trainer(clip_folder, tmp_path, callbacks=[Stop()])
        trainer._run_epoch = lambda **kwargs: None
        with pytest.raises(ValueError, match="no update was made"):
            trainer.train()

    def test_model_by_folder(self, clip_folder, processor, tmp_path):
        trainer = SimCLIPTrainer(
            model=str(clip_folder), args=arguments(tmp_path), train_dataset=make_dataset(6), processing_class=processor
        )
        assert trainer.model.transform.resize == 32

    def test_stock_model_is_trained_in_place(self, clip_folder, processor, tmp_path):
        model = CLIPModel.from_pretrained(clip_folder)
        before = model.visual_projection.weight.detach().clone()
        trainer = SimCLIPTrainer(
            model=model, args=arguments(tmp_path), train_dataset=make_dataset(6), processing_class=processor
        )
        trainer.train()
        assert trainer.model.visual_projection.weight is model.visual_projection.weight
        assert not torch.equal(model.visual_projection.weight, before)

    def test_vision_tower_trains_but_can_not_classify(self, clip_folder, tmp_path):
        folder = vision_folder(clip_folder, tmp_path / "tower", CLIPVisionModelWithProjection)
        trainer = SimCLIPTrainer(
            model=as_encoder(load_encoder(folder)), args=arguments(tmp_path / "o"), train_dataset=make_dataset(6)
        )
        trainer.train()
        with pytest.raises(ValueError, match="vision tower alone"):
            trainer.evaluate(make_dataset(6))

    def test_base_class_says_what_is_missing(self, clip_folder, tmp_path):
        trainer = AdversarialTrainer(model=load_encoder(clip_folder), args=arguments(tmp_path))
        for call in (trainer.attack_objective, lambda e, b: trainer.robust_loss(e, b, None)):
            with pytest.raises(NotImplementedError, match="AdversarialTrainer must say"):
                call(trainer.model, None)

    @pytest.mark.parametrize("option", ["compute_metrics", "model_init", "evaluation_dataset"])
    def test_an_option_that_would_do_nothing_is_refused(self, option, clip_folder, tmp_path):
        with pytest.raises(TypeError, match=f"SimCLIPTrainer has no use for {option}"):
            SimCLIPTrainer(load_encoder(clip_folder), arguments(tmp_path), make_dataset(6), **{option: None})

    def test_training_record(self, clip_folder, tmp_path):
        record = make_trainer(clip_folder, tmp_path, form="frozen", gradient_accumulation_steps=2).training_record()
        wanted = {"method": "Sim-CLIP", "form": "frozen", "feature": "pooled", "eps": 1 / 255, "world_size": 1}
        assert wanted.items() <= record.items()
        assert record["batch_size"] == 12
        assert {"token_layer", "seed", "steps", "attack_steps"} <= set(record)
