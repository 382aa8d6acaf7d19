"""What is installed, on what it runs, what is missing, and what to type for it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "hf-robust-vision"
EXTRAS = {
    "demo": "the offline demo",
    "vlm": "image processors of vision-language models",
    "report": "pictures, and the charts of cards",
    "caption": "scores of captions",
    "corruptions": "evaluate --corruptions",
    "app": "app in the browser",
}
# In the order in which they load each other: the first that fails is the one to mend.
_LOADED = ("torch", "torchvision", "transformers", "accelerate", "peft", "datasets", "evaluate")
_PAIRS = {"torchvision": "torch torchvision"}  # built for one another


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found."""

    version: str  # of this package
    python: str
    platform: str
    packages: dict[str, str | None]  # version of each that is needed; None where it is missing
    optional: dict[str, str | None]  # of each that an extra brings
    missing: dict[str, list[str]]  # what each extra lacks
    devices: list[str]
    offline: bool  # whether the Hub is not to be asked
    problems: list[str]  # each ends with what to type

    @property
    def healthy(self) -> bool:
        """Whether all that the package cannot do without is here, new enough, and loads; extras do not count."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {"schema": 1, "healthy": self.healthy, **asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"{DISTRIBUTION} {self.version}, Python {self.python}, {self.platform}",
            f"needs:    {_listed(self.packages)}",
            f"optional: {_listed(self.optional)}",
            f"devices:  {', '.join(self.devices) or 'unknown without torch'}",
            f"Hub:      {'not asked (HF_HUB_OFFLINE)' if self.offline else 'asked where no folder is named'}",
        ]
        lines += [
            f"without {', '.join(lacking)} there is no {EXTRAS[extra]}; for it type pip install "
            f'"{DISTRIBUTION}[{extra}]"'
            for extra, lacking in self.missing.items()
            if lacking
        ]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join([*lines, *(["all that the package needs is here"] if self.healthy else [])])


def diagnose() -> Diagnosis:
    """Look at this installation; nothing is changed and no network is asked."""
    from . import __version__

    try:
        needed, extras = list(_requirements()), {extra: list(_requirements(extra)) for extra in EXTRAS}
        problems = [said for requirement in needed if (said := unmet(requirement))]
    except PackageNotFoundError:
        needed, extras = [], {}
        problems = [f"{DISTRIBUTION} is on the path but not installed; type pip install -e . where its code lies"]
    except ModuleNotFoundError as error:
        needed, extras = [], {}
        problems = [f"{error.name} is missing; type pip install {error.name}"]
    problems += next(([said] for name in _LOADED if (said := broken(name))), [])
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={requirement.name: installed(requirement.name) for requirement in needed},
        optional={one.name: installed(one.name) for requirements in extras.values() for one in requirements},
        missing={extra: [one.name for one in own if unmet(one)] for extra, own in extras.items()},
        devices=_devices(),
        offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
        problems=problems,
    )


def installed(name: str) -> str | None:
    """The version of a package; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def unmet(requirement: Requirement) -> str | None:
    """Why a requirement is not met, with what to type; None where it is."""
    found = installed(requirement.name)
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return None
    state = "is missing" if found is None else f"is {found}, wanted {requirement.specifier}"
    return f'{requirement.name} {state}; type pip install "{requirement.name}{requirement.specifier}"'


def broken(name: str) -> str | None:
    """Why an installed package does not load, with what to type; None where it does, or is missing."""
    if installed(name) is None:
        return None
    try:
        import_module(name)
    except Exception as error:  # a package that was built for another one raises anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        again = _PAIRS.get(name, name)
        return (
            f"{name} {installed(name)} does not load ({reason}); type pip install --upgrade --force-reinstall {again}"
        )
    return None


def _requirements(extra: str = "") -> Iterator[Requirement]:
    """What the package needs, or what one extra adds, as its own metadata says."""
    lines = requires(DISTRIBUTION) or ()
    from packaging.requirements import Requirement  # itself one of them, which may be missing

    for requirement in map(Requirement, lines):
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if always == bool(extra) or (extra and not requirement.marker.evaluate({"extra": extra})):  # type: ignore[union-attr]
            continue
        if requirement.name == DISTRIBUTION:
            for other in sorted(requirement.extras):
                yield from _requirements(other)
        else:
            yield requirement


def _devices() -> list[str]:
    if broken("torch") or installed("torch") is None:
        return []
    import torch

    from .processes import usable_cores

    found = [f"cpu ({usable_cores()} cores)"]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found.append(f"cuda:{number} ({about.name}, {about.total_memory / 2**30:.0f} GiB)")
    return found + ["mps"] * torch.backends.mps.is_available()


def _listed(packages: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {number or 'missing'}" for name, number in packages.items())
