"""Options that save passes of the attack, against computations of their own; and what a pass is."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_robust_vision.attacks import LinfBall, StartNoise, cosine_distance, pgd_last
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.methods.tecoa import TeCoATrainer
from hf_robust_vision.methods.tima import TIMATrainer
from hf_robust_vision.training.batch import Batch
from hf_robust_vision.training.overfitting import CatastrophicOverfittingError, check_overfitting
from hf_robust_vision.training.savings import FAST
from hf_robust_vision.training.starts import LEVELS, CarriedStarts
from tests.conftest import make_dataset
from tests.training.helpers import SGD, arguments, largest_gap, make_stream, make_trainer, weights
from tests.training.ranks import final, said, start


EPS = 8 / 255
CARRIED = {
    "carry_starts_mb": 1,
    "attack_free_step": True,
    "attack_steps": 1,
    "attack_token_share": 0.5,
    "feature": "both",
}


class Counted:
    """Passes over images, seen from inside the networks by hooks on their vision towers."""

    def __init__(self, trainer):
        self.total = self.rows = 0
        for encoder in {trainer.model, trainer.reference.encoder}:
            encoder.vision_model.encoder.register_forward_hook(self.forward)
        trainer.model.vision_model.encoder.layers[0].mlp.fc1.weight.register_hook(self.weight)

    def forward(self, module, inputs, output):
        hidden = output.last_hidden_state
        rows = hidden.shape[0] * hidden.shape[1] / 17  # tokens of a whole image
        self.total += rows
        if hidden.requires_grad:
            self.rows = rows
            hidden.register_hook(lambda _: self.backward(rows))

    def backward(self, rows):
        self.total += rows

    def weight(self, _):
        self.total += self.rows


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"attack_steps": 10}, 24), ({}, 8), ({"form": "anchored"}, 11), ({"attack_token_share": 0.5}, 4 + 4 * 9 / 17),
        ({"attack_resolution": 16}, 4 + 4 * 5 / 17), ({"attack_resolution": 16, "attack_cheap_until": 1.0}, 4 + 2 * 5 / 17),
        ({"form": "paper", "on_collapse": "record"}, 11), ({"kind": TeCoATrainer}, 7),
        ({"kind": TIMATrainer, "takd_weight": 1.0, "takd_student": "clean"}, 11),
        ({"carry_starts_mb": 1, "attack_free_step": True, "attack_steps": 0}, 4), ({"gradient_accumulation_steps": 2}, 8),
        ({"feature": "both", "attack_cheap_until": 1.0, "attack_token_share": 0.25}, 4 + 2 * 5 / 17),
    ],
)  # fmt: skip
def test_passes_are_those_that_hooks_see(settings, passes, clip_folder, tmp_path):
    """Logged for an update whose log costs passes of its own, which do not count."""
    shared = {"max_steps": 2, "logging_steps": 2, "learning_rate": 1e-6} | settings
    trainer = make_trainer(clip_folder, tmp_path, **shared)
    images, step, seen = 6, trainer.training_step, []

    def counted(*args, **kwargs):
        counter.total, quiet = 0, trainer.state.global_step == 1  # the other logs, which looks at images as well
        loss = step(*args, **kwargs)
        if quiet:
            seen.append((counter.total / images, trainer._passes[-1]))
        return loss

    trainer.training_step = counted
    counter = Counted(trainer)
    trainer.train()
    assert [count for both in seen for count in both] == pytest.approx([passes] * 2 * len(seen))
    assert len(seen) == trainer.args.gradient_accumulation_steps
    if trainer.method != "TIMA":  # whose log asks for the target before the loss does
        assert trainer.state.log_history[0]["passes"] == pytest.approx(passes, abs=1e-6)


def test_remembered_targets_cost_no_pass(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, max_steps=8, cache_targets_mb=1)  # of four batches
    trainer.train()
    passes = [row["passes"] for row in trainer.state.log_history if "passes" in row]
    assert passes == [8.0] * 4 + [7.0] * 4


def test_a_start_is_where_the_attack_ended():
    images = torch.rand(3, 3, 4, 4, dtype=torch.float64)
    ball, ids = LinfBall(EPS), torch.tensor([7, 1, 4])
    ended = ball.start(images, StartNoise(1, ids.tolist()).draw(images))
    starts = CarriedStarts(1, EPS, make_dataset(3))
    starts.remember(ids, images, ended)
    fresh = StartNoise(0, [4, 9, 7], 5)
    mixed = torch.stack([images[2], images[1], images[0]])
    drawn = ball.start(mixed, starts.noise(fresh, random=True).draw(mixed))
    assert (drawn[[0, 2]] - ended[[2, 0]]).abs().max() <= EPS / LEVELS / 2 + 1e-9
    assert torch.equal(drawn[1], ball.start(mixed, fresh.draw(mixed))[1]), "a new sample starts as ever"
    assert torch.equal(ball.start(mixed, starts.noise(fresh, random=False).draw(mixed))[1], mixed[1])
    again = CarriedStarts(1, EPS, make_dataset(3))
    again.take(starts.state())
    assert torch.equal(ball.start(mixed, again.noise(fresh, random=True).draw(mixed)), drawn)


def test_starts_keep_to_their_memory():
    starts = CarriedStarts(1, EPS, make_dataset(3))
    images = torch.rand(9, 3, 256, 256)  # 192 KiB each: five fit
    starts.remember(torch.arange(9, 0, -1), images, images)
    assert starts.state()["starts_ids"].tolist() == [1, 2, 3, 4, 5]
    starts.remember(torch.tensor([3, 11]), images[:2], images[:2])
    assert len(starts) == 5
    with pytest.raises(ValueError, match="for a stream type 0"):
        CarriedStarts(1, EPS, make_stream())


def test_the_free_step_goes_up_the_learners_loss(clip_folder, tmp_path):
    """One update, and the loss of its batch at the weights of before it, by autograd from scratch."""
    settings = {"double": True, "attack_steps": 1, "carry_starts_mb": 1, "max_steps": 1, "attack_eps": EPS} | SGD
    trainer = make_trainer(clip_folder, tmp_path, attack_free_step=True, **settings)
    plain = make_trainer(clip_folder, tmp_path, **settings)
    batches = []
    for each in (trainer, plain):
        loss = each.robust_loss
        each.robust_loss = lambda model, *parts, loss=loss: (batches.append(parts), loss(model, *parts))[1]
        each.train()
    assert largest_gap(weights(trainer), weights(plain)) == 0, "the learner learns as ever"
    batch, adversarial = batches[0]
    leaf = adversarial.detach().clone().requires_grad_(True)
    distance = cosine_distance(trainer.reference.encoder(leaf).image_embeds, batch.original.image_embeds)
    (gradient,) = torch.autograd.grad(distance.sum(), leaf)
    ball = LinfBall(EPS)
    wanted = ball.project(adversarial.detach() + 1.25 * EPS * gradient.sign(), batch.images)
    for each, ended in ((trainer, wanted), (plain, adversarial.detach())):
        drawn = each.starts.noise(StartNoise(0, batch.ids.tolist()), random=True).draw(batch.images)
        assert (ball.start(batch.images, drawn) - ended).abs().max() <= EPS / LEVELS / 2 + 1e-9


def test_a_schedule_goes_from_cheap_to_full(tmp_path):
    cheap = {"attack_cheap_until": 0.5, "attack_token_share": 0.25, "attack_steps": 3, "attack_step_size": "1/255"}
    plan = arguments(tmp_path, **cheap).attack_plan
    assert plan(0, 10) == plan(4, 10) == (1, None, 0.25, False)
    assert plan(5, 10) == plan(9, 10) == (3, 1 / 255, 1.0, False)
    free = arguments(tmp_path, attack_free_step=True, carry_starts_mb=1, **cheap)
    assert free.attack_plan(0, 10).steps == 0
    always = arguments(tmp_path, attack_token_share=0.5)
    assert always.attack_plan(9, 10) == (2, None, 0.5, False)
    small = arguments(tmp_path, attack_resolution=16, attack_cheap_until=0.5).attack_plan
    assert [small(step, 10).low_resolution for step in (0, 4, 5)] == [True, True, False]


def test_an_attack_on_a_share_is_that_of_a_tower_that_sees_it(clip_folder, tmp_path):
    """Two steps on halves, by PGD's formula; which half, from the noise of (seed, step, sample)."""
    trainer = make_trainer(clip_folder, tmp_path, double=True, attack_eps=EPS, attack_token_share=0.5, feature="both")
    trainer.state.global_step = 3
    images, ids = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([5, 8])
    batch = Batch(images, torch.zeros(2), ids, trainer.targets)
    encoder = trainer.model.eval()
    found = trainer.attack(trainer.attack_objective(encoder, batch), batch)
    noise, ball = StartNoise(0, [5, 8], 3), LinfBall(EPS)
    order = noise.uniform((16,), "tokens").argsort(1)
    at = ball.start(images, noise.draw(images))
    for turn in range(2):
        leaf = at.clone().requires_grad_(True)
        kept = order[:, turn * 8 : turn * 8 + 8]
        with trainer.token_share.keep(kept, batch.original.patch_tokens):
            output = encoder(leaf, token_layer=-2)
        rows = kept[..., None].expand(-1, -1, 32)
        apart = (output.patch_tokens.gather(1, rows) - batch.original.patch_tokens.gather(1, rows)).square()
        loss = apart.flatten(1).sum(1) / (16 * 32) / trainer.token_variances[0]
        loss = loss + cosine_distance(output.image_embeds, batch.original.image_embeds)
        at = ball.project(at + 1.25 * EPS * torch.autograd.grad(loss.sum(), leaf)[0].sign(), images)
    assert (found - at).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [SimCLIPTrainer, TeCoATrainer])
def test_an_attack_at_a_lower_resolution_is_that_of_a_tower_that_sees_it(kind, clip_folder, tmp_path):
    """Two steps by PGD's formula, with the tower's parts called by hand; each pixel of the images moves."""
    trainer = make_trainer(clip_folder, tmp_path, kind=kind, double=True, attack_eps=EPS, attack_resolution=16)
    trainer.state.global_step = 3
    images, ids = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([5, 8])
    batch = Batch(images, torch.tensor([0, 2]), ids, trainer.targets)
    encoder, vision = trainer.model.eval(), trainer.model.vision_model
    found = trainer.attack(trainer.attack_objective(encoder, batch), batch)
    whole, original, ball = encoder(images).image_embeds, batch.original.image_embeds, LinfBall(EPS)
    at = ball.start(images, StartNoise(0, [5, 8], 3).draw(images))
    for _ in range(2):
        leaf = at.clone().requires_grad_(True)
        small = torch.nn.functional.interpolate(leaf, (16, 16), mode="bilinear", antialias=True)
        pooled = vision(encoder.transform.normalize(small), interpolate_pos_encoding=True).pooler_output
        embeds = encoder.visual_projection(pooled)
        if kind is TeCoATrainer:
            loss = torch.nn.functional.cross_entropy(trainer.logits(embeds), batch.labels, reduction="sum")
        else:
            loss = cosine_distance(embeds, original).sum()
        at = ball.project(at + 1.25 * EPS * torch.autograd.grad(loss, leaf)[0].sign(), images)
    assert (found - at).abs().max() < 1e-12
    assert ((found - images).abs() > 0).all()
    assert torch.equal(encoder(images).image_embeds, whole), "asleep again"


def test_a_resumed_run_is_the_unbroken_one(clip_folder, tmp_path):
    run = CARRIED | {"max_steps": 10, "save_strategy": "steps", "save_steps": 6, "learning_rate": 1e-3}
    whole = make_trainer(clip_folder, tmp_path, **run)  # two and a half epochs
    whole.train()
    again = make_trainer(clip_folder, tmp_path, **run)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert largest_gap(weights(whole), weights(again)) == 0


def test_two_processes_carry_the_same_starts(clip_folder, tmp_path):
    shared = SGD | CARRIED | {"double": True, "max_steps": 14}  # the third epoch begins after twelve
    one, two = tmp_path / "one", tmp_path / "two"
    assert start(clip_folder, one, per_device_train_batch_size=4, **shared) == [0], said(one)
    assert start(clip_folder, two, world=2, per_device_train_batch_size=2, **shared) == [0, 0], said(two)
    assert largest_gap(final(one), final(two)) < 1e-10
    assert largest_gap(final(two), final(two, 1)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack_token_share": 0}, "attack_token_share must be above 0"),
        ({"attack_cheap_until": 2}, "attack_cheap_until is a share"),
        ({"attack_resolution": 0}, "attack_resolution must be at least 1, got 0"),
        ({"attack_resolution": 16, "fast": True}, "attack_resolution and attack_token_share are two ways"),
        ({"carry_starts_mb": 1, "attack_norm": "l2"}, "carry_starts_mb is for attack_norm linf"),
        ({"attack_free_step": True}, "type --carry_starts_mb 1024"),
        ({"attack_steps": 0}, "attack_steps must be at least 1, got 0; 0 is for --attack_free_step true"),
        ({"attack_compile": "true"}, "attack_compile='true' is not one of.*'inductor'"),
        ({"on_overfitting": "go on"}, "on_overfitting='go on' is not one of"),
    ],
)
def test_what_makes_no_sense_together_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_a_smaller_view_has_no_tokens_to_compare(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="attack_resolution is not for feature both"):
        make_trainer(clip_folder, tmp_path, attack_resolution=16, feature="both")


def test_fast_is_one_word(clip_folder, tmp_path):
    args = arguments(tmp_path, fast=True, attack_steps=10, attack_step_size="1/255")
    assert {name: getattr(args, name) for name in FAST} == FAST
    assert args.probe_every == 50
    trainer = make_trainer(clip_folder, tmp_path, fast=True, feature="both")
    trainer.train()
    record = trainer.training_record()
    assert [record[name] for name in ("fast", "attack_steps", "attack_token_share", "precision")] == [
        True,
        2,
        0.5,
        "bf16",
    ]
    assert arguments(tmp_path, attack_steps=3).probe_every == 0


class NoWaiting(TorchDispatchMode):
    """Stops at an operation for which the host would wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert not any(part in name for part in self.WAITS), f"{name} waits for the device"
        assert "_to_copy" not in name or "device" not in (kwargs or {}), f"{name} copies between devices"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings", [{}, {"attack_token_share": 0.5}, {"attack_resolution": 16}, {"kind": TeCoATrainer}]
)
def test_no_step_of_an_attack_waits_for_the_device(settings, clip_folder, tmp_path):
    """Between the first gradient and the last step; before and after it a batch looks once."""
    trainer = make_trainer(clip_folder, tmp_path, attack_steps=4, **settings)
    images = torch.rand(2, 3, 32, 32)
    batch = Batch(images, torch.tensor([0, 1]), torch.tensor([0, 1]), trainer.targets)
    objective = trainer.attack_objective(trainer.passes.watch(trainer.model.eval()), batch)
    calls, watch = [], NoWaiting()

    def watched(at):
        calls.append(1)
        if len(calls) == 2:  # the first may fill what is computed once
            watch.__enter__()
        losses = objective(at)
        if len(calls) == 4:
            watch.__exit__(None, None, None)
        return losses

    trainer.attack(watched, batch)
    assert len(calls) == 4
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        images.sum().item()


def test_catastrophic_overfitting_is_stopped_and_named(clip_folder, tmp_path):
    """Driven into it: one step of the whole radius, from the image itself, at a large radius."""
    driven = {
        "kind": TeCoATrainer, "train": make_dataset(96), "max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "attack_eps": "16/255", "attack_steps": 1, "attack_step_size": "16/255",
        "attack_random_start": False, "probe_every": 20, "on_collapse": "record", "logging_steps": 20,
    }  # fmt: skip
    with pytest.raises(
        CatastrophicOverfittingError, match=r"catastrophic overfitting at step (20|40).*10 steps.*type --"
    ):
        make_trainer(clip_folder, tmp_path, **driven).train()
    healthy = driven | {
        "attack_steps": 3,
        "attack_step_size": None,
        "attack_random_start": True,
        "attack_eps": "2/255",
    }
    trainer = make_trainer(clip_folder, tmp_path, **healthy)
    trainer.train()
    shares = [row["attack_share_of_probe"] for row in trainer.state.log_history if "attack_share_of_probe" in row]
    assert shares, "looked at"
    assert min(shares) > 0.4
    with pytest.warns(UserWarning, match="catastrophic overfitting at step 7"):
        check_overfitting(0.1, 1.0, "record", 7, "")


def test_looking_for_overfitting_changes_no_weight(clip_folder, tmp_path):
    runs = [make_trainer(clip_folder, tmp_path, max_steps=4, probe_every=every) for every in (0, 1)]
    for run in runs:
        run.train()
    assert largest_gap(*map(weights, runs)) == 0


def test_pgd_from_a_known_start_goes_on():
    """Two steps in two visits are the two steps of one, but for the rounding of what is kept."""
    weight = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 4, 4)
    images, ids, ball = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64), torch.tensor([3]), LinfBall(EPS)

    def objective(at):
        return (at * weight).flatten(1).sum(1)

    fresh, starts = StartNoise(0, [3]), CarriedStarts(1, EPS, make_dataset(3))
    once = pgd_last(objective, images, ball, steps=2, step_size=EPS / 4, noise=fresh)
    for _ in range(2):
        at = pgd_last(objective, images, ball, steps=1, step_size=EPS / 4, noise=starts.noise(fresh, random=True))
        starts.remember(ids, images, at)
    assert (at - once).abs().max() <= EPS / LEVELS / 2 + 1e-9
