"""The card repeats robustness.json and nothing else."""

from __future__ import annotations

import ast
import re

import pytest
from huggingface_hub import ModelCard

from hf_robust_vision.evaluation.results import pretty_eps
from hf_robust_vision.hub.card import eval_results, is_hub_id, license_of, make_card, write_card
from hf_robust_vision.hub.usage import KINDS, replace_usage, usage_block
from tests.evaluation.test_results import result
from tests.report.test_escape import HOSTILE


def test_numbers_of_table_and_index(tmp_path):
    results = [
        result(model="before", robust_accuracy=0.125),
        result(training={"method": "Sim-CLIP", "form": "frozen"}),
    ]
    path = write_card(tmp_path, results, model_name="m", base_model="org/base", dataset="tiny", tags=["sim-clip"])
    card = ModelCard.load(path)
    values = {(row.metric_type, row.metric_value) for row in card.data.eval_results}
    assert values == {("accuracy", 0.75), ("robust_accuracy", 0.5)}
    assert card.data.base_model == "org/base"
    assert "sim-clip" in card.data.tags
    text = path.read_text()
    assert "| before | apgd-ce, linf 4/255 | 75.0 % (30.0 to 95.0) | 12.5 % (15.0 to 85.0) | 4 |" in text
    assert "| after | apgd-ce, linf 4/255 | 75.0 % (30.0 to 95.0) | 50.0 % (15.0 to 85.0) | 4 |" in text
    assert "- form: frozen" in text
    assert "| name | steps | restarts | radii | models |" in text
    assert "| apgd-ce | 5 | 1 | 4/255 | all |" in text


def test_card_of_the_original_alone_is_refused():
    with pytest.raises(ValueError, match="hardened model"):
        make_card([result(model="before")], model_name="m")


@pytest.mark.parametrize("attacks", [[], [{"name": "pgd-0", "steps": 0, "restarts": 1}]])
def test_a_number_without_an_attack_is_no_card(attacks):
    """findings-reliability 2: robust accuracy under an attack of no step is clean accuracy."""
    with pytest.raises(
        ValueError, match=r"after on tiny \(apgd-ce, linf 4/255\) was measured with no .*means nothing"
    ):
        make_card([result(attacks=attacks)], model_name="m")
    make_card([result(attacks=attacks, eps=0.0)], model_name="m")  # a clean control needs none


def test_radii_are_written_as_people_do():
    assert pretty_eps(result(eps=8 / 255)) == "8/255"
    assert pretty_eps(result(eps=0.5 / 255)) == "0.5/255"
    assert pretty_eps(result(eps=3.5, norm="l2")) == "3.5"


def test_a_card_says_what_its_results_say():
    """findings-code 3 and findings-journey 10, 11: of any task, with the restarts of each radius, and nothing of None."""
    attack = {"name": "apgd-ce", "steps": 5, "objective": "cross-entropy"}
    training = {"method": "FARE", "norm": "linf", "eps": 2 / 255, "attack_step_size": None, "learning_rate": 1e-5}
    prompts = {"templates": ["a {}"], "template_hash": "abc"}
    rows = [
        result(attacks=[attack | {"restarts": 1}], eps=2 / 255, training=training, **prompts),
        result(attacks=[attack | {"restarts": 5}], eps=4 / 255, training=training, **prompts),
    ]
    text = make_card(rows, model_name="m").text
    assert "| apgd-ce | 5 | cross-entropy | 1 | 2/255 | all |" in text
    assert "| apgd-ce | 5 | cross-entropy | 5 | 4/255 | all |" in text
    assert "4 samples, 2 classes; protocol apgd-ce, linf. 1 prompt template (hash abc)" in text
    assert "- eps: 2/255\n- learning rate: 1e-05" in text
    assert "None" not in text
    assert make_card(rows[:1], model_name="m").text.count("apgd-ce, linf 2/255") == 1

    family = {"name": "fog", "resolution": 64, "seed": 0, "accuracy": 0.5, "severity": 3}
    corrupted = result(task="corruption", norm="none", eps=0.0, severity=3, attacks=[family], left_out=["snow"])
    text = make_card([corrupted], model_name="m").text
    assert "| after | apgd-ce, severity 3 |" in text
    assert "| fog | 64 | 0 | severity 3 | all |" in text
    assert "Left out, because they were not asked for: snow." in text

    vqa = result(task="vqa", metric="answer accuracy", class_names=[], attacks=[attack])
    text = make_card([vqa, *rows], model_name="m").text
    assert "Question answering, answer accuracy; 4 samples; protocol apgd-ce, linf." in text
    assert "Zero-shot classification, accuracy; 4 samples, 2 classes" in text
    assert "0 classes" not in text


def test_rows_survive_the_round_trip():
    """Attack arguments and intervals too; a None would not be written, and not come back."""
    attack = {"name": "apgd-ce", "steps": 5, "restarts": 1, "target": None, "step_size": "adaptive"}
    results = [
        result(attacks=[attack]),
        result(attacks=[attack], eps=8 / 255),
        result(attacks=[attack], group="unseen"),
        result(attacks=[attack], task="vqa", norm="l2", eps=0.5),
    ]
    card = ModelCard(str(make_card(results, model_name="m")))
    assert card.data.eval_results == eval_results(results)
    rows = [(row.task_type, row.metric_type, row.metric_name) for row in card.data.eval_results]
    assert rows == [
        ("zero-shot-image-classification", "accuracy", "Clean accuracy"),
        ("zero-shot-image-classification", "robust_accuracy", "Robust accuracy (linf 4/255)"),
        ("zero-shot-image-classification", "robust_accuracy", "Robust accuracy (linf 8/255)"),
        ("zero-shot-image-classification", "accuracy", "Clean accuracy, unseen classes"),
        ("zero-shot-image-classification", "robust_accuracy", "Robust accuracy (linf 4/255, unseen classes)"),
        ("visual-question-answering", "accuracy", "Clean accuracy"),
        ("visual-question-answering", "robust_accuracy", "Robust accuracy (l2 0.5)"),
    ]
    assert card.data.eval_results[1].metric_args["attacks"] == [{k: v for k, v in attack.items() if v is not None}]


def test_only_what_is_on_the_hub_is_linked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "clip").mkdir(parents=True)
    assert [is_hub_id(name) for name in ("openai/clip", "clip", "outputs/clip", "/srv/clip", "./clip", "a/b/c")] == [
        True, False, False, False, False, False,
    ]  # fmt: skip
    training = {"method": "Sim-CLIP"}
    settings = {"model_name": "m", "license": "mit", "paper": "2407.14971"}
    card = make_card([result(training=training)], base_model="demo-clip", **settings)
    assert card.data.base_model is None
    assert "A `CLIPModel` made from `demo-clip`: its vision tower was" in card.text
    assert "[Sim-CLIP](https://arxiv.org/abs/2407.14971)" in card.text
    card = make_card([result(training=training)], base_model="openai/clip", dataset="imagenet-1k", **settings)
    told = (card.data.base_model, card.data.base_model_relation, card.data.datasets, card.data.license)
    assert told == ("openai/clip", "finetune", ["imagenet-1k"], "mit")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "zero-shot-image-classification")


def snippet(card):
    """The Python of the usage block."""
    (block,) = re.findall(r"```python\n(.*?)\n```", card, flags=re.DOTALL)
    return block


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_becomes_code_or_markup(name, tmp_path):
    """findings-reliability 4 and 13: the snippet only loads and prints, whatever names it holds."""

    def text_of(name):
        named = {"dataset": name, "split": name, "protocol": name, "templates": [f"{name} {{}}"], "left_out": [name]}
        named |= {"class_names": [name, "dog"], "template_hash": name, "training": {"method": name, name: name}}
        named |= {"attacks": [{"name": name, "steps": 5, "restarts": 1}]}
        results = [result(model="before", **named), result(**named)]
        path = write_card(tmp_path, results, model_name=name, base_model=name, paper="2407.14971")
        card = ModelCard.load(path)
        assert card.data.eval_results == eval_results(results[1:])
        return card.text

    text, plain = text_of(name), text_of("name")
    tree, plain_tree = ast.parse(snippet(text)), ast.parse(snippet(plain))
    assert ast.dump(tree) == ast.dump(plain_tree).replace("'name name'", repr(f"{name} {name}")).replace(
        "'name dog'", repr(f"{name} dog")
    )
    assert len(text.splitlines()) == len(plain.splitlines())
    outside = re.sub(
        r"```python.*?\n```|<!-- /?usage.*?-->|(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", text, flags=re.DOTALL
    )
    assert "<" not in outside
    block = usage_block("model", "me/clip", result())
    assert len(re.findall(r"^```\w*$", replace_usage(text, block), flags=re.MULTILINE)) == 2
    assert block in replace_usage(text, block)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_repository_or_an_original_of_any_name_is_quoted(kind, name):
    tree = ast.parse(snippet(usage_block(kind, name, result(), name)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loaded = [call.args[-1] for call in calls if getattr(call.func, "attr", "") == "from_pretrained"]
    assert {ast.literal_eval(argument) for argument in loaded} == {name}


def test_figure_first_then_numbers_use_and_limits():
    rows = [result(model="before", robust_accuracy=0.125), result(), result(eps=8 / 255, robust_accuracy=0.25)]
    rows.insert(1, result(model="before", eps=8 / 255, robust_accuracy=0.0))
    text = make_card(rows, model_name="m", picture="robustness.png", license="mit", base_model="org/base").text
    order = [
        "# m",
        "![accuracy, % over radius",
        "On tiny (test, 4 samples)",
        "| model |",
        "## How to use",
        "## Limits",
    ]
    order += ["## How it was measured", "## How it was trained"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    told = "accuracy: 75.0 % clean, 25.0 % at linf 8/255. The original: 75.0 % clean, 0.0 % at linf 8/255."
    assert told in text
    assert (
        "The terms of the original (`org/base`) hold for what was made from it. Licence of this repository: `mit`."
        in text
    )
    text = make_card([result()], model_name="m").text
    assert "The original:" not in text
    assert "names no licence of its own" in text


def test_a_licence_is_read_from_the_card_of_a_folder(tmp_path):
    assert license_of("demo-llava") == "apache-2.0"
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert license_of(tmp_path) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of(tmp_path) is None
    assert license_of("nobody/nothing") is None
