"""What trackers are told: the robust metrics, the same in each."""

from __future__ import annotations

import pytest

from tests.training.helpers import make_trainer


TRAINING = {"loss", "attack_loss", "attack_gain", "cosine_to_original", "pairwise_cosine", "samples_per_second"}
MEASURED = {"clean_accuracy", "robust_accuracy", "robust_accuracy_1_255", "robust_accuracy_0.5_255"}


def tracked(clip_folder, output, tracker):
    """Train two steps and evaluate at two radii; the log that `Trainer` keeps itself."""
    settings = {"eval_eps": ["1/255", "0.5/255"], "max_steps": 2, "report_to": [tracker], "run_name": "tracked"}
    trainer = make_trainer(clip_folder, output, **settings)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_robust_accuracy"] == metrics["eval_robust_accuracy_1_255"]
    assert metrics["eval_robust_accuracy_1_255"] <= metrics["eval_robust_accuracy_0.5_255"]
    return trainer


def wanted(trainer) -> dict[str, float]:
    """Last value of every name that a tracker should hold, in its spelling."""
    values = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    training = {f"train/{name}": values[name] for name in TRAINING}
    return training | {f"eval/{name}": values[f"eval_{name}"] for name in MEASURED}


def test_tensorboard(clip_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tracked(clip_folder, tmp_path / "out", "tensorboard")
    found = {}
    for folder in {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    for name, value in wanted(trainer).items():
        step, last = found[name][-1]
        assert last == pytest.approx(value, rel=1e-6), name
        assert step == 2
    assert len(found["train/attack_gain"]) == 2, "at each logging step"


def test_wandb(clip_folder, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = tracked(clip_folder, tmp_path / "out", "wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert {name: summary[name] for name in wanted(trainer)} == wanted(trainer)


def test_trackio(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    trainer = tracked(clip_folder, tmp_path / "out", "trackio")
    trackio.finish()
    from trackio.sqlite_storage import SQLiteStorage

    found = {}
    assert SQLiteStorage.get_runs("huggingface") == ["tracked"], "evaluated after training, and still one run"
    for row in SQLiteStorage.get_logs("huggingface", "tracked"):
        found |= row
    assert {name: found[name] for name in wanted(trainer)} == pytest.approx(wanted(trainer))
