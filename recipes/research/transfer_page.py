"""The page and the figures of what `compare.py --config` measured, from its JSON files in `docs/results`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison import difference
from transfer import Config

from hf_robust_vision.evaluation.results import eps_text
from hf_robust_vision.files import write_atomically
from hf_robust_vision.report.curve import Curve, Point
from hf_robust_vision.report.pictures import frontier, plot_panels, plot_points
from hf_robust_vision.report.tables import markdown_table, percent


DRAWN = 6  # hardened models in a figure; the colours go no further


def write_transfer_page(docs: Path, config: Config) -> Path:
    """Write the page from the JSON files that are there, and return its path."""
    page = docs / f"results-{config.name}.md"
    write_atomically(page, make_transfer_page(docs, config))
    return page


def write_figure(docs: Path, table: str, content: Mapping[str, Any]) -> None:
    """Accuracy over eps on each data set: the original, ours, and the others with the highest scores."""
    rows = content["rows"]
    hardened = [row for row in rows if row["updates"]]
    order = sorted(hardened, key=lambda row: (not row["ours"], -row["score"]["value"]))
    drawn = [row for row in rows if not row["updates"]] + order[:DRAWN]
    panels = {
        each["name"]: [
            Curve(row["label"], place, [_point(eps, value) for eps, value in row["sets"][each["name"]].items()])
            for place, row in enumerate(drawn)
        ]
        for each in content["sets"]
    }
    plot_panels(panels, ("eps in 255ths", "accuracy under attack, %"), docs / "results" / f"{table}.png")
    axes = ("clean accuracy, mean over the sets, %", f"mean of {', '.join(content['lead_eps'])}, %")
    plot_points(_points(content), axes, docs / "results" / f"{table}-frontier.png")


def _points(content: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Clean accuracy and the mean of the robust ones of each row, over the sets."""
    return {
        row["label"]: (
            row["mean"]["clean"]["value"],
            statistics.mean(row["mean"][eps]["value"] for eps in content["lead_eps"]),
        )
        for row in content["rows"]
    }


def _point(eps: str, value: Mapping[str, float]) -> Point:
    return Point(0.0 if eps == "clean" else float(eps.split("/")[0]), value["value"], value["low"], value["high"])


def make_transfer_page(docs: Path, config: Config) -> str:
    """The page of all numbers of a configuration that lie in `docs/results`."""
    name, tables = config.name, config.tables
    read = {key: _read(docs / "results" / f"{key}.json") for key in (*tables, f"{name}-choice", f"{name}-margins")}
    found = {key: read[key] for key in tables if read[key]}
    text = f"# {config.title or name}\n\nWritten by `recipes/research/compare.py`; do not edit. "
    text += "The numbers lie in `results/*.json`.\n"
    for key, content in found.items():
        text += f"\n{_table_section(key, content, _read(docs / 'results' / f'{key}-estimate.json'))}"
        if (docs / "results" / f"{key}.png").is_file():
            text += f"\n![Accuracy over eps](results/{key}.png)\n\nDrawn are the original, ours, and the others of the highest scores.\n"
        if (docs / "results" / f"{key}-frontier.png").is_file():
            text += (
                f"\n![Clean accuracy against robust accuracy](results/{key}-frontier.png)\n\n{_frontier(content)}\n"
            )
    for chosen, choice in (read[f"{name}-choice"] or {}).items():
        text += f"\n{_choice_section(chosen, choice)}"
    for key in tables:
        if checked := _read(docs / "results" / f"{key}-cross.json"):
            text += f"\n{_cross_section(key, checked)}"
    if read[f"{name}-margins"]:
        text += f"\n{_margins_section(read[f'{name}-margins'])}"
    return text


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _table_section(key: str, content: Mapping[str, Any], estimate: Mapping[str, Any] | None) -> str:
    training, test, rows = content["training"], content["test"], content["rows"]
    made_with = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    eps = eps_text(training["attack_eps"], "linf")
    seeds = f"seed {test['seeds'][0]}" if len(test["seeds"]) == 1 else f"seeds {', '.join(map(str, test['seeds']))}"
    text = f"""## Fine-tuned at {eps}: `{key}`

`{content["command"]}`

- Model: {content["about"].strip()}.
- Fine-tuning: {training["passes"]:,.0f} passes of the image tower a run (a forward pass of an image is one, its gradient to
  the activations another, to the weights a third; prompts by their share of the work), batches of {training["batch_size"]},
  AdamW, cosine schedule, {", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in training["options"].items())}; {seeds}.
- Measured by {", then ".join(_said(row) for row in content["attacks"])}, worst case per sample, in the Linf ball.
- {"; ".join(_set(each) for each in content["sets"])}.
- In brackets 95 % intervals: the wider of the bootstrap's over images and seeds and Wilson's over images. The score is the mean of clean and of
  {", ".join(content["lead_eps"][:-1])} and {content["lead_eps"][-1]}, over the sets.
- Learning rates and weights were chosen on validation photos of the training set, see below.
- Made with {made_with}; start checkpoint `{content["hashes"]["start"][:16]}`, prompts `{content["hashes"]["prompts"]}`,
  source `{content["hashes"]["source"]}`.

Mean over the sets:

{_mean_table(rows)}
"""
    for each in content["sets"]:
        text += f"\n{each['name']}:\n\n{_accuracies(rows, each['name'])}\n"
    if content["paired"]:
        text += (
            "\nDifferences of scores in points, paired over images and seeds, not corrected for their number:\n\n"
            f"{_paired(content['paired'])}\n\n{' '.join(map(_verdict, content['leads']))}\n"
        )
    text += _claims(content)
    text += (
        f"\nWhat each attack leaves, in percent (of all photos, in the order of the attacks):\n\n{_left(content)}\n"
    )
    text += f"\nSanity checks of the first seed, {_checked(content)}:\n\n{_sanity(rows)}\n"
    text += f"\nHow the rows were trained:\n\n{_training(rows)}\n"
    if estimate and any(estimate.get(key) != content[key] for key in ("asked", "training", "test")):
        estimate = None  # it was made for other settings
    return text + f"\nProcessor hours, one thread a run:\n\n{_hours(content['cpu_hours'], estimate)}\n"


def _frontier(content: Mapping[str, Any]) -> str:
    names = frontier(_points(content))
    return (
        f"What there is to choose between, from the most clean accuracy to the most robust: {', '.join(names)}. Each other row is "
        "below one of them in both, or in one and equal in the other; differences may be chance."
    )


def _said(attack: Mapping[str, Any]) -> str:
    aim = f" towards each of the {attack['target']}" if attack.get("target") else ""
    return f"{attack['name']} with {attack['steps']} steps{aim} and {attack['restarts']} restart"


def _set(each: Mapping[str, Any]) -> str:
    return (
        f"{each['name']}: {each['num_samples']} photos of `{each['split']}`, {each['classes']} classes, attacked at "
        f"{each['resolution']} px ({each['terms']})"
    )


def _cell(value: Mapping[str, float]) -> str:
    return f"{100 * value['value']:.1f} ({100 * value['low']:.1f} to {100 * value['high']:.1f})"


def _mean_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0]["mean"])
    cells = [[row["label"], *(_cell(row["mean"][column]) for column in columns), _cell(row["score"])] for row in rows]
    return markdown_table(["method", *columns, "score"], cells)


def _accuracies(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    columns = list(rows[0]["sets"][name])
    cells = [[row["label"], *(_cell(row["sets"][name][column]) for column in columns)] for row in rows]
    return markdown_table(["method", *columns], cells)


def _paired(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [f"{row['one']} - {row['other']}", row["set"], *difference(row, "higher" if row["low"] > 0 else "lower")]
        for row in rows
    ]
    return markdown_table(["difference", "set", "points", "95 % interval", "verdict"], cells)


def _claims(content: Mapping[str, Any]) -> str:
    """What the paper of TIMA claims: a lead at radii and on sets that were not trained on, and similarities that stay."""
    if not content["challenges"]:
        return ""
    cells = [
        [
            f"{row['one']} - {row['other']}",
            row["sets"],
            row["eps"],
            *difference(row, "higher" if row["low"] > 0 else "lower"),
        ]
        for row in content["challenges"]
    ]
    head = ["difference", "sets", "eps", "points", "95 % interval", "verdict"]
    text = (
        "\nWhat the paper of TIMA claims, a lead at radii and on sets that were not trained on, is looked for here; sets "
        f"weigh alike, nothing is corrected for the number of lines:\n\n{markdown_table(head, cells)}\n"
    )
    kept = [f"{row['label']} {row['texts_kept']:.3f}" for row in content["rows"] if row["texts_kept"] is not None]
    if kept:
        text += (
            "\nSimilarities of the class texts after hardening against those before (Pearson over the pairs of "
            f"classes): {', '.join(kept)}.\n"
        )
    return text


def _cross_section(key: str, found: Mapping[str, Any]) -> str:
    rows = [
        [row["label"], *(f"{100 * row[name]:.1f}" for name in ("clean", "ours", "theirs")), f"{_above(row):+.1f}"]
        for row in found["rows"]
    ]
    seconds = {name: sum(row["cpu_seconds"][name] for row in found["rows"]) for name in ("ours", "theirs")}
    return f"""## Cross-check by another implementation: `{key}`

`{found["command"]}`

The standard AutoAttack of pyautoattack {found["versions"]["pyautoattack"]} on {found["rows"][0]["num_samples"]} test photos of {found["set"]} at
{found["eps"]}, and ours with the settings of the table on the same photos; first seed. Ours should leave no more than theirs.
Processor seconds: ours {seconds["ours"]:.0f}, theirs {seconds["theirs"]:.0f}.

{markdown_table(["method", "clean", "ours", "theirs", "ours above theirs"], rows)}
"""


def _above(row: Mapping[str, Any]) -> float:
    return 100 * float(row["ours"] - row["theirs"])


def _verdict(found: Mapping[str, Any]) -> str:
    nearest, worst = found["nearest"], found["worst"]
    said = (
        f"the nearest on the mean is {nearest['other']} ({100 * nearest['difference']:+.1f} points), the smallest "
        f"difference on one set is that to {worst['other']} on {worst['set']} ({100 * worst['difference']:+.1f})."
    )
    verdict = "leads" if found["leads"] else "does not lead"
    return (
        f"**{found['one']} {verdict}**, where a lead is 2 points on the mean with every interval above 0, and no set more "
        f"than 1 point below: {said}"
    )


def _left(content: Mapping[str, Any]) -> str:
    cells = []
    for row in content["rows"]:
        for name, radii in row["left"].items():
            after = [" / ".join(f"{100 * share:.1f}" for share in shares.values()) for shares in radii.values()]
            cells.append([row["label"], name, *after])
    radii = next(iter(content["rows"][0]["left"].values()))
    order = " / ".join(next(iter(radii.values())))
    return markdown_table(["method", f"set: {order}", *radii], cells)


def _checked(content: Mapping[str, Any]) -> str:
    how = content["sanity"]
    return f"{how['samples']} photos that the model gets right, {how['protocol']} of {how['steps']} steps"


def _sanity(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for row in rows:
        if row["sanity"]:
            ran = [check for check in row["sanity"]["checks"] if check["verdict"] != "not run"]
            said = ", ".join(row["sanity"]["flagged"]) or row["sanity"].get("why") or "nothing"
            cells.append([row["label"], row["sanity"]["verdict"], said, len(ran)])
    return markdown_table(["method", "verdict", "flagged", "checks"], cells)


def _training(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            row["label"],
            f"{row['learning_rate']:g}",
            f"{row['weight']:g}",
            f"{row['passes_per_update']:.0f}",
            row["updates"],
            f"{statistics.mean(row['cpu_seconds']):.0f}",
            ", ".join(f"{name} {value}" for name, value in row["options"].items()),
        ]
        for row in rows
        if row["updates"]
    ]
    head = ["method", "rate", "weight of the hardened", "passes an update", "updates", "CPU s", "settings"]
    return markdown_table(head, cells)


def _hours(used: Mapping[str, float], estimate: Mapping[str, Any] | None) -> str:
    expected = (estimate or {}).get("cpu_hours", {})
    parts = list(dict.fromkeys([*expected, *used]))
    cells = [[part, _hour(expected.get(part)), _hour(used.get(part))] for part in parts]
    total = [sum(hours.values()) if hours else None for hours in (expected, used)]
    return markdown_table(["part", "at most, said before", "used"], [*cells, ["all", *map(_hour, total)]])


def _hour(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:.2f}"


def _choice_section(name: str, choice: Mapping[str, Any]) -> str:
    settings, about = choice["settings"], choice["about"]
    radii = [eps_text(each, "linf") for each in settings["eps"]]
    rows = [
        [
            entry["label"],
            f"{tried['learning_rate']:g}" if tried["learning_rate"] else "",
            f"{tried['weight']:g}",
            f"{100 * tried['clean_accuracy']:.1f}",
            *(f"{100 * tried['robust_accuracy'][radius]:.1f}" for radius in radii),
            f"{100 * tried['score']:.1f}",
            "chosen" if _is_chosen(tried, entry) else "",
        ]
        for entry in choice["rows"].values()
        for tried in entry["tried"]
    ]
    best = choice["rows"].get(choice["ours"])
    ours = f"\nOf ours **{best['label']}** has the highest score, and is the one that is tested.\n" if best else ""
    return f"""## What was chosen at {name}

{chr(10).join(f"- `{command}`" for command in choice["commands"])}

On {_validation(settings, about)}, with seed {settings["seed"]} after
{settings["passes"]:,.0f} passes, by {_said(about["attacks"][0])} alone; the highest mean of clean and of the radii. First the
learning rate, then the share of the hardened weights between the original's and them.

{markdown_table(["method", "rate", "weight", "clean", *radii, "score", ""], rows)}
{ours}"""


def _validation(settings: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    if "parts" not in about:
        return f"{about['num_samples']} validation photos of {about['dataset']} that no fine-tuning saw"
    parts = ", ".join(f"{number} of {part}" for part, number in about["parts"].items())
    return (
        f"validation photos of {about['dataset']} ({parts}), each among the names of its own part. Neither these photos nor "
        f"any photo or name of {100 * settings['unseen']['share']:g} % of its classes took part in fine-tuning; rows that are "
        "not ours stand beside at what was chosen for them above; parts weigh alike"
    )


def _is_chosen(tried: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Of the original there is no choice."""
    return bool(tried["learning_rate"]) and all(tried[key] == entry[key] for key in ("learning_rate", "weight"))


def _margins_section(found: Mapping[str, Any]) -> str:
    gate = [[f"{row['eta']:g}", percent(row["class"]), percent(row["sample"])] for row in found["gate_open"]]
    etas = ", ".join(f"{row['eta']:.3f} for {percent(row['share'])}" for row in found["eta_for_share"])
    columns = list(found["similarity"])
    lines = {f"had, {name}": values for name, values in found["had"].items()}
    lines |= {f"required, {mode}": values for mode, values in found["required"].items()}
    lines |= {"cosine of the two texts": found["similarity"]}
    sizes = [[name, *(f"{values[column]:.3f}" for column in columns)] for name, values in lines.items()]
    met = ", ".join(f"{mode} {percent(share)}" for mode, share in found["met"].items())
    told = found["correlation"]
    return f"""## TIMA's gate and margin on this model

`{found["command"]}`

{found["num_samples"]} clean validation photos of {found["dataset"]}, {found["classes"]} classes, as the original model sees them
(clean accuracy {percent(found["clean_accuracy"])}, logit scale {found["logit_scale"]:.1f}).

Share of wrong classes that the gate opens for:

{markdown_table(["eta", "by class (reading A)", "by sample (reading B)"], gate)}

By class it opens at eta {etas} of the wrong classes.

Gaps in cosine, quantiles over photos and wrong classes, at a margin of 0.1:

{markdown_table(["gap", *columns], sizes)}

Wrong classes whose required gap the clean photo keeps already: {met}.

Gap that the model has against similarity of the texts, over {told["class_pairs"]:,} pairs of classes: Pearson {told["pearson"]:.3f}, Spearman
{told["spearman"]:.3f} (image by image: Pearson {told["pearson_by_image"]:.3f}). The paper is said to report -0.685 and -0.651. Below 0 the model's
own gaps grow with distance, as in the reading `distance`; above 0 with similarity, as in `similarity`.
"""
