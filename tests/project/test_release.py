"""One version everywhere, and metadata that an index and its readers need."""

import re
import sys
import tomllib
from runpy import run_path
from types import ModuleType

import pytest

import gmemcore
from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def as_numbers(version):
    assert re.fullmatch(r"\d+\.\d+\.\d+", version), version
    return [int(part) for part in version.split(".")]


def test_the_version_is_written_once():
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version", "readme", "urls"]
    as_numbers(gmemcore.__version__)


def test_the_changelog_knows_the_version():
    """Its newest release is this version; or this version is newer, and what is new is under Unreleased."""
    sections = re.findall(r"^## \[([^]]+)\](.*)$", CHANGELOG, re.M)
    released = [name for name, _ in sections if name != "Unreleased"]
    assert released == sorted(released, key=as_numbers, reverse=True)
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", rest) for name, rest in sections if name in released)
    if released[:1] != [gmemcore.__version__]:
        assert sections[0][0] == "Unreleased"
        assert not released or as_numbers(gmemcore.__version__) > as_numbers(released[0])
        unreleased = CHANGELOG.partition("## [Unreleased]")[2].partition("\n## [")[0]
        assert re.search(r"^- ", unreleased, re.M)


def test_metadata_are_complete():
    for name in ("description", "license", "requires-python", "authors", "keywords", "classifiers"):
        assert PROJECT[name], name
    assert all((ROOT / path).exists() for path in PROJECT["license-files"])
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {lowest}" in PROJECT["classifiers"]
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (ROOT / "gmemcore" / "py.typed").exists()


@pytest.fixture
def hook(monkeypatch):
    """The metadata of a build, at an address; hatchling, which only builds need, is played by two names."""
    for name in ("hatchling.builders.hooks.plugin.interface", "hatchling.metadata.plugin.interface"):
        module = ModuleType(name)
        module.BuildHookInterface = module.MetadataHookInterface = object
        monkeypatch.setitem(sys.modules, name, module)
    built = run_path(str(ROOT / "hatch_build.py"))

    def metadata(address):
        monkeypatch.delenv("GMEMCORE_ADDRESS", raising=False)
        made = built["Address"]()
        made.root, made.config, found = str(ROOT), {"address": address}, {"version": gmemcore.__version__}
        made.update(found)
        return found

    return metadata


def test_with_an_address_an_index_can_follow_every_link(hook):
    found = hook("https://example.org/gmemcore/")
    tree = f"https://example.org/gmemcore/{{}}/v{gmemcore.__version__}/"
    places = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", found["readme"]["text"])
    assert len(places) > 8
    for picture, place in places:
        start = tree.format("raw" if picture else "blob")
        assert place.startswith(start)
        assert (ROOT / place.removeprefix(start).partition("#")[0]).exists()
    assert found["urls"]["Repository"] == "https://example.org/gmemcore"
    assert set(found["urls"]) == {"Repository", "Changelog", "Documentation", "Issues"}


def test_without_an_address_readme_is_as_it_is(hook, monkeypatch):
    found = hook("")
    assert found["readme"] == {"content-type": "text/markdown", "text": (ROOT / "README.md").read_text()}
    assert found["urls"] == {}


def test_floors_of_dependencies_are_versions_that_were_tested():
    """``.ci/versions`` runs the suite with them; ``.ci/run`` builds the site with those of its group."""
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    oldest, newest = (locked(name) for name in ("oldest.lock", "requirements.lock"))
    count = 0
    for group, requirements in groups.items():
        for requirement in requirements:
            if requirement.startswith(("gmemcore[", "atheris")):
                continue
            name, floor = requirement.split(">=")
            assert same_version((newest if group == "docs" else oldest)[name], floor), requirement
            count += 1
    assert count > 25


def locked(name):
    """Versions by name, as names of packages are compared."""
    lines = [line.split("==") for line in (ROOT / ".ci" / name).read_text().splitlines() if "==" in line]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in lines}


def same_version(one, other):
    numbers = [[int(part) for part in version.split(".")] for version in (one, other)]
    longest = max(map(len, numbers))
    return len({tuple(each + [0] * (longest - len(each))) for each in numbers}) == 1
