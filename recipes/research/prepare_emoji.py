"""Make the emoji benchmark: many classes with near and far names, drawn in two styles.

    python recipes/research/prepare_emoji.py --output_dir outputs/emoji

Fetches the npm packages emoji-datasource-google and emoji-datasource-twitter with `npm pack`, or takes their tarballs
or unpacked folders (`--google`, `--twitter`), and writes a `datasets` folder of 64x64 RGB images on white, with the
licences beside it. The classes are emoji that come in six skin tones: people and hands. For each emoji three tones go
to train, one to validation and two to test, in both styles, so every split holds every class and no image is in two.
A quarter of the names are listed in `unseen.txt`, for a fine-tuning that leaves them out. Nothing is random: tones and
names are drawn by a hash.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image


VERSION = "16.0.0"
INTEGRITY = {  # of the tarballs, as the registry states it
    "google": "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "twitter": "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
}
TONES = ("none", "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
SPLITS = ("train", "train", "train", "validation", "test", "test")
SIZE = 64
ATTRIBUTION = f"""# Where these images come from

Both styles are taken from npm packages of the emoji-data project by Cal Henderson (https://github.com/iamcal/emoji-data),
version {VERSION}. The packages' own README states the licences of the art; their MIT licence covers code and data.

| column `style` | art | licence | package |
|---|---|---|---|
| google | Noto Emoji, Google, https://github.com/googlefonts/noto-emoji | Apache-2.0, `LICENSES/Apache-2.0.txt` | `emoji-datasource-google` |
| twitter | Twemoji, Twitter and other contributors, https://github.com/jdecked/twemoji | CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/ | `emoji-datasource-twitter` |

The names are those of `emoji.json`, MIT, `LICENSES/MIT.txt`.

Changed: a selection of the images, each laid on white and stored as 64x64 RGB. Names in lower case without punctuation.
"""


@dataclass(frozen=True)
class Emoji:
    """One class: its code points, its name, and the file of each skin tone."""

    code: str
    name: str
    subcategory: str
    files: Mapping[str, str]


def fetch(style: str, folder: Path) -> Path:
    """Download one package with `npm pack`.

    Raises:
        SystemExit: If npm is missing or fails.
    """
    package = f"emoji-datasource-{style}@{VERSION}"
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(f"npm is not installed; run `npm pack {package}` elsewhere and pass --{style} FILE.")
    done = subprocess.run([npm, "pack", package], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"npm pack {package} failed:\n{done.stderr}")
    return folder / f"emoji-datasource-{style}-{VERSION}.tgz"


def read_package(style: str, path: Path) -> dict[str, bytes]:
    """The files of one package by their path in it: its JSON, its licence and the 64 px images.

    Args:
        style: "google" or "twitter".
        path: Its tarball, which is checked against INTEGRITY, or its unpacked folder.

    Raises:
        ValueError: If it is another package or version, or the tarball was changed.
    """
    wanted = re.compile(rf"(package\.json|emoji\.json|LICENSE|img/{style}/64/[^/]+\.png)")
    if path.is_dir():
        root = path / "package" if (path / "package").is_dir() else path
        names = (file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
        files = {name: (root / name).read_bytes() for name in names if wanted.fullmatch(name)}
    else:
        content = path.read_bytes()
        digest = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
        if digest != INTEGRITY[style]:
            raise ValueError(f"{path} is not emoji-datasource-{style} {VERSION}: {digest}, wanted {INTEGRITY[style]}.")
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = {member.name.removeprefix("package/"): member for member in tar if member.isfile()}
            files = {
                name: tar.extractfile(member).read() for name, member in members.items() if wanted.fullmatch(name)
            }
    if missing := {"package.json", "emoji.json", "LICENSE"} - files.keys():
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}; wanted emoji-datasource-{style} {VERSION}.")
    about = json.loads(files["package.json"])
    if (about["name"], about["version"]) != (f"emoji-datasource-{style}", VERSION):
        raise ValueError(
            f"{path} holds {about['name']} {about['version']}, wanted emoji-datasource-{style} {VERSION}."
        )
    return files


def choose(entries: Sequence[Mapping[str, Any]]) -> list[Emoji]:
    """The classes among the entries of `emoji.json`, in its order.

    Kept are emoji in six skin tones. Left out are those that face right, mirror images of others, and those of no
    gender where a man and a woman do the same: at this size the three are drawn alike.
    """
    toned = [entry for entry in entries if len(entry.get("skin_variations", ())) == len(TONES) - 1]
    codes = {entry["unified"] for entry in toned}
    return [
        Emoji(
            entry["unified"],
            re.sub(r"[^a-z0-9]+", " ", entry["name"].lower()).strip(),
            entry["subcategory"],
            {"none": entry["image"]} | {tone: entry["skin_variations"][tone]["image"] for tone in TONES[1:]},
        )
        for entry in toned
        if not entry["unified"].endswith("-200D-27A1-FE0F") and not codes & _gendered(entry["unified"])
    ]


def _gendered(code: str) -> set[str]:
    """Code points that the man of an emoji of no gender may have: person to man, or a male sign joined on."""
    man = {"1F468" + code.removeprefix("1F9D1")} if code.startswith("1F9D1") else set()
    return man | {f"{base}-200D-2642-FE0F" for base in (code, code.removesuffix("-FE0F"))}


def concept(name: str) -> str:
    """What a man and a woman of an emoji share: "man farmer" and "woman farmer" are "farmer"."""
    return " ".join(word for word in name.split() if word not in ("man", "woman"))


def held_out(names: Sequence[str]) -> list[str]:
    """A quarter of the concepts with all their names, so that no word of theirs comes in through the other gender."""
    concepts = sorted({concept(name) for name in names}, key=_draw)
    chosen = set(concepts[: len(concepts) // 4])
    return [name for name in names if concept(name) in chosen]


def _draw(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def picture(content: bytes) -> Image.Image:
    """An image of a package on white."""
    drawing = Image.open(io.BytesIO(content)).convert("RGBA")
    if drawing.size != (SIZE, SIZE):
        raise ValueError(f"an image has {drawing.size} pixels, wanted {(SIZE, SIZE)}.")
    sheet = Image.new("RGBA", drawing.size, "white")
    sheet.alpha_composite(drawing)
    return sheet.convert("RGB")


def build(packages: Mapping[str, Mapping[str, bytes]]) -> datasets.DatasetDict:
    """Images, labels and origins in three splits.

    Emoji of which two images are equal are left out: one would be in train and the other in test.

    Raises:
        ValueError: If a package lacks an image, or two emoji have one name.
    """
    chosen = []
    for emoji in choose(json.loads(packages["google"]["emoji.json"])):
        images = {}
        for style, files in packages.items():
            for tone, file in emoji.files.items():
                if (content := files.get(f"img/{style}/{SIZE}/{file}")) is None:
                    raise ValueError(f"the {style} package has no image {file} of {emoji.name!r}.")
                images[style, tone] = picture(content)
        if len({image.tobytes() for image in images.values()}) == len(images):
            chosen.append((emoji, images))
    names = [emoji.name for emoji, _ in chosen]
    if len(set(names)) < len(names):
        raise ValueError(f"two emoji have one name: {sorted({n for n in names if names.count(n) > 1})}.")
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for label, (emoji, images) in enumerate(chosen):
        order = sorted(TONES, key=lambda tone, code=emoji.code: _draw(f"{code} {tone}"))
        for (style, tone), image in images.items():
            origin = {"style": style, "tone": tone, "emoji": emoji.code, "subcategory": emoji.subcategory}
            rows[SPLITS[order.index(tone)]].append({"image": image, "label": label, **origin})
    text = dict.fromkeys(("style", "tone", "emoji", "subcategory"), datasets.Value("string"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names), **text})
    return datasets.DatasetDict({split: datasets.Dataset.from_list(part, features) for split, part in rows.items()})


def write(packages: Mapping[str, Mapping[str, bytes]], folder: Path) -> datasets.DatasetDict:
    """Build, and write all of it or nothing."""
    parts = build(packages)
    names = parts["train"].features["label"].names
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        made = Path(place) / "made"
        parts.save_to_disk(made)
        (made / "unseen.txt").write_text("\n".join(held_out(names)) + "\n")
        (made / "ATTRIBUTION.md").write_text(ATTRIBUTION)
        (made / "LICENSES").mkdir()
        shutil.copy(Path(__file__).parents[2] / "LICENSE", made / "LICENSES" / "Apache-2.0.txt")
        (made / "LICENSES" / "MIT.txt").write_bytes(packages["google"]["LICENSE"])
        made.replace(folder)
    return parts


def main() -> None:
    """Fetch what is not given, write the folder, say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/emoji"), help="new or empty folder")
    for style in INTEGRITY:
        parser.add_argument(f"--{style}", type=Path, help=f"tarball or folder of emoji-datasource-{style} {VERSION}")
    args = parser.parse_args()
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"{args.output_dir} is not empty; choose another --output_dir.")
    with tempfile.TemporaryDirectory() as place:
        given = {style: getattr(args, style) or fetch(style, Path(place)) for style in INTEGRITY}
        try:
            packages = {style: read_package(style, path) for style, path in given.items()}
            parts = write(packages, args.output_dir)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    names = parts["train"].features["label"].names
    counts = ", ".join(f"{len(part)} {split}" for split, part in parts.items())
    print(f"{args.output_dir}: {len(names)} names, {len(held_out(names))} of them held out; images: {counts}")


if __name__ == "__main__":
    main()
