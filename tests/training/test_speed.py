"""Options that make a step faster: the same result, within what is said here."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import DynamoBackend

from hf_robust_vision.attacks import CompiledStep
from hf_robust_vision.methods.tecoa import TeCoATrainer
from hf_robust_vision.methods.tima import TIMATrainer
from hf_robust_vision.training.speed import matmul_precision
from tests.training.helpers import largest_gap, make_trainer, weights


def log_of(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture
def compiled():
    """A backend, and the calls of the graphs that it was given."""
    torch._dynamo.reset()
    calls = []

    def backend(graph, inputs):
        return lambda *args: (calls.append(id(graph)), graph.forward(*args))[1]

    yield backend, calls
    torch._dynamo.reset()


def test_matmul_precision_holds_within_a_step_only(clip_folder, tmp_path, monkeypatch):
    trainer = make_trainer(clip_folder, tmp_path, matmul_precision="medium", max_steps=1, eval_strategy="steps")
    during, loss, evaluate = {}, trainer.compute_loss, trainer.evaluate

    def seen(name, function):
        def call(*args, **kwargs):
            during[name] = torch.get_float32_matmul_precision()
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(trainer, "compute_loss", seen("step", loss))
    monkeypatch.setattr(trainer, "evaluate", seen("evaluate", evaluate))
    before = torch.get_float32_matmul_precision()
    trainer.train()
    assert during == {"step": "medium", "evaluate": before}
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), matmul_precision("high"):
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_gives_the_same_result(precision, clip_folder, tmp_path):
    """Loss within 1 % over five updates; exact where the processor has no such products."""
    plain = make_trainer(clip_folder, tmp_path, max_steps=5)
    fast = make_trainer(clip_folder, tmp_path, max_steps=5, matmul_precision=precision)
    plain.train()
    fast.train()
    assert log_of(fast) == pytest.approx(log_of(plain), rel=1e-2)


@pytest.mark.filterwarnings("error::UserWarning:torch")
@pytest.mark.parametrize(
    "options", [pytest.param({}, id="full"), pytest.param({"use_peft": True}, id="lora", marks=pytest.mark.slow)]
)
def test_compiled_training_is_the_same_training(options, compiled, clip_folder, tmp_path):
    """The encoder keeps class and names, nothing wraps it, and each pass of attack and learner is one graph."""
    backend, calls = compiled
    settings = {"double": True, "max_steps": 3, "learning_rate": 1e-3, "logging_steps": 100} | options
    plain = make_trainer(clip_folder, tmp_path, **settings)
    plain.train()
    trainer = make_trainer(clip_folder, tmp_path, torch_compile=True, torch_compile_backend="eager", **settings)
    assert trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    assert trainer.model._compiled_call_impl is not None
    trainer.model.compile(backend=backend)
    trainer.train()
    assert trainer.model_wrapped is trainer.model
    monitored = 3  # at step 0: the clean features, the attacked loss and the clean loss
    checked = 1  # at the end: whether the last batch has collapsed
    assert len(calls) == 3 * (trainer.args.attack_steps + 1) + monitored + checked
    assert largest_gap(weights(plain), weights(trainer)) < 1e-12
    assert trainer.evaluate()["eval_clean_accuracy"] == plain.evaluate()["eval_clean_accuracy"]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"kind": TeCoATrainer}, {"kind": TIMATrainer}, {"attack_norm": "l2", "attack_eps": 0.5}, {"attack_resolution": 16},
        {"attack_token_share": 0.5, "feature": "both"}, {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["frozen", "tecoa", "tima", "l2", "resolution", "tokens", "torch_compile"],
)  # fmt: skip
def test_a_compiled_attack_step_is_the_step(options, clip_folder, tmp_path):
    """Every step of three updates is one and the same graph, nothing is compiled anew, and no pass goes uncounted."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(inputs)
        return graph.forward

    settings = {"double": True, "max_steps": 3, "learning_rate": 1e-3, "attack_steps": 3, "probe_every": 0} | options
    plain = make_trainer(clip_folder, tmp_path, **settings)
    trainer = make_trainer(clip_folder, tmp_path, attack_compile="eager", **settings)
    trainer.attack_step = CompiledStep(backend)
    for each in (plain, trainer):
        each.train()
    assert len(graphs) == 1
    assert largest_gap(weights(plain), weights(trainer)) < 1e-12
    assert log_of(plain, "passes") == log_of(trainer, "passes")
    assert log_of(plain, "attack_gain") == pytest.approx(log_of(trainer, "attack_gain"), rel=1e-6)


def test_an_attack_step_through_aot_is_the_step(clip_folder, tmp_path):
    """In float32: the graph of forward pass and gradient is traced by autograd, and rounds as it does."""
    torch._dynamo.reset()
    plain = make_trainer(clip_folder, tmp_path)
    fast = make_trainer(clip_folder, tmp_path, attack_compile="aot_eager")
    for each in (plain, fast):
        each.train()
    assert log_of(fast) == pytest.approx(log_of(plain), rel=1e-5)
    assert log_of(fast, "attack_gain") == pytest.approx(log_of(plain, "attack_gain"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{"torch_compile": True}, {"attack_compile": "inductor"}], ids=lambda how: next(iter(how))
)
def test_inductor_gives_the_same_result(how, clip_folder, tmp_path):
    """Loss within 0.1 % and attack gain within 2 % over five updates in float32."""
    torch._dynamo.reset()
    plain = make_trainer(clip_folder, tmp_path, max_steps=5)
    fast = make_trainer(clip_folder, tmp_path, max_steps=5, **how)
    plain.train()
    fast.train()
    assert log_of(fast) == pytest.approx(log_of(plain), rel=1e-3)
    assert log_of(fast, "attack_gain") == pytest.approx(log_of(plain, "attack_gain"), rel=2e-2)
