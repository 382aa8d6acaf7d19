"""Scores beside the card, in the form of huggingface_hub, and read back by its own functions."""

from __future__ import annotations

import shutil

import pytest
import yaml
from huggingface_hub import EvalResultEntry, parse_eval_result_entries

from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.evaluation.results import load_results
from hf_robust_vision.hub.card import write_card
from hf_robust_vision.hub.eval_files import eval_files
from hf_robust_vision.pipeline.measure import EvaluationSet
from hf_robust_vision.pixels import PixelTransform
from tests.evaluation.test_results import result
from tests.hub import client as remote
from tests.hub.conftest import describe


ATTACKS = [{"name": "apgd-ce", "steps": 100, "restarts": 5}, {"name": "square", "queries": 5000, "restarts": 1}]
ON_HUB = {"dataset": "CIFAR-10", "dataset_id": "org/cifar10", "attacks": ATTACKS}


def parsed(files):
    """By path, and refused where the client's own class refuses a field."""
    return {path: parse_eval_result_entries(yaml.safe_load(content)) for path, content in files.items()}


def test_only_what_is_on_the_hub_is_told():
    assert eval_files([result(), result(dataset="me/folder")]) == {}


def test_each_radius_is_a_task_of_its_own_with_its_attacks():
    rows = [result(**ON_HUB), result(**ON_HUB, eps=8 / 255, robust_accuracy=0.25), result(**ON_HUB, group="unseen")]
    rows += [result(**ON_HUB, norm="l2", eps=0.5), result(**ON_HUB, task="vqa", metric="answer accuracy")]
    rows += [result(**ON_HUB | {"attacks": []}, eps=0.0), result(**ON_HUB | {"dataset_id": "org/other"})]
    found = parsed(eval_files(rows))
    assert list(found) == [".eval_results/robustness-org--cifar10.yaml", ".eval_results/robustness-org--other.yaml"]
    entries, _ = found.values()
    assert [(entry.task_id, entry.value) for entry in entries] == [
        ("zero_shot_clean_accuracy", 0.75), ("zero_shot_robust_accuracy_4_255", 0.5),
        ("zero_shot_robust_accuracy_8_255", 0.25), ("zero_shot_clean_accuracy_unseen", 0.75),
        ("zero_shot_robust_accuracy_4_255_unseen", 0.5), ("zero_shot_robust_accuracy_l2_0.5", 0.5),
        ("vqa_clean_answer_accuracy", 0.75), ("vqa_robust_answer_accuracy_4_255", 0.5),
    ]  # fmt: skip
    assert {entry.dataset_id for entry in entries} == {"org/cifar10"}
    assert entries[0].notes == "accuracy, clean images, no attack; 4 samples of test; 95 % interval 0.300 to 0.950"
    assert entries[1].notes == (
        "accuracy, linf 4/255, protocol apgd-ce: apgd-ce (steps 100, restarts 5), square (restarts 1, queries 5000); "
        "4 samples of test; 95 % interval 0.150 to 0.850"
    )


def test_the_file_is_the_clients_form():
    """Nothing that its own entry would not write."""
    (content,) = eval_files([result(**ON_HUB)]).values()
    for row in yaml.safe_load(content):
        assert set(row) == {"dataset", "value", "notes"}
        EvalResultEntry(dataset_id=row["dataset"]["id"], task_id=row["dataset"]["task_id"], value=row["value"])


def test_they_lie_beside_the_card(tmp_path):
    write_card(tmp_path, [result(**ON_HUB), result(**ON_HUB, model="before")], model_name="m")
    (path,) = (tmp_path / ".eval_results").iterdir()
    assert {path.relative_to(tmp_path).as_posix(): path.read_bytes()} == eval_files([result(**ON_HUB)])


def test_pushed_and_read_by_the_client(hub, client, measured, tmp_path):
    """A later push takes the place of the file, and leaves those of others."""
    folder = shutil.copytree(measured, tmp_path / "run")
    results = load_results(folder)
    for row in results:
        row.dataset_id = "org/tiny"
    describe(folder, results)
    done = client(remote.push, folder, "me/robust-clip")
    name = ".eval_results/robustness-org--tiny.yaml"
    assert name in done["report"].files
    after = [row for row in results if row.model == "after"]
    scores = client(remote.model_info, "me/robust-clip")["scores"]
    assert scores == parsed(eval_files(after))[name]
    assert [score.value for score in scores] == pytest.approx(
        [after[0].clean_accuracy, *(row.robust_accuracy for row in after)], abs=1e-6
    )
    assert all("protocol apgd-ce: apgd-ce (steps 3" in score.notes for score in scores[1:])
    repo = hub.repos["me/robust-clip"]
    repo.commits[repo.refs["main"]][".eval_results/theirs.yaml"] = (b"[]", False)
    client(remote.push, measured, "me/robust-clip")
    left = {file for file in hub.files("me/robust-clip") if file.startswith(".eval_results/")}
    assert left == {".eval_results/theirs.yaml"}


def test_where_data_came_from_is_known_under_any_name(monkeypatch, image_folder):
    """A list of data sets calls them as it likes; a local folder has no id."""
    transform = PixelTransform(32, (32, 32))
    local = load_labelled_images(image_folder, "test", transform)
    assert local.hub_id is None
    monkeypatch.setattr("hf_robust_vision.data.sources._open", lambda *_, **__: (local.rows, None))
    images, _ = EvaluationSet("org/cifar10", name="CIFAR-10").load(transform)
    assert (images.name, images.hub_id, images.select([0]).hub_id) == ("CIFAR-10", "org/cifar10", "org/cifar10")
