"""One set of pins: pyproject.toml, constraints.txt and environment.yml name the same versions."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(lines):
    """name → exact version."""
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith(("#", "-e"))]
    for requirement in requirements:
        assert str(requirement.specifier).startswith("=="), f"{requirement} is not an exact pin"
    return {r.name.lower().replace("_", "-"): str(r.specifier).removeprefix("==") for r in requirements}


def declared():
    return pins(
        PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    )


def test_constraints_hold_every_declared_pin():
    constraints = pins((ROOT / "constraints.txt").read_text().splitlines())
    assert declared().items() <= constraints.items()


def test_environment_holds_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *conda, last = environment["dependencies"]
    assert list(last) == ["pip"], "one trailing pip block"
    conda_pins = dict(entry.split("=", 1) for entry in conda if "=" in entry)
    assert conda_pins.pop("python") == PROJECT["requires-python"].removeprefix(">=")
    from_pip = pins(last["pip"])
    both = conda_pins | from_pip
    core = pins(PROJECT["dependencies"])
    extras = declared()
    assert core.keys() <= both.keys(), f"missing: {core.keys() - both.keys()}"
    assert {name: extras[name] for name in both} == both
    assert next(iter(from_pip)) == "torch", "torch comes first, or another package pulls its own build"
