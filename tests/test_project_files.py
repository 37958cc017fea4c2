"""What the project says about itself agrees: versions, commands of make, workflows, links between pages."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "configs", "data", "docs", "weights")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BLOCK = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@cache
def make_targets() -> frozenset[str]:
    lines = (ROOT / "Makefile").read_text().splitlines()
    return frozenset(found[1] for line in lines if (found := re.match(r"([\w-]+):(?!=)", line)))


def in_code(text: str) -> list[str]:
    """What a page shows as code: blocks, and spans within lines."""
    blocks = [block[3:] for block in BLOCK.findall(text)]
    return [*blocks, *re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))]


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changes = re.findall(r"^## \[(\d[^\]]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    citation = read_yaml(ROOT / "CITATION.cff")
    assert changes[0] == (version, citation["date-released"].isoformat())
    assert citation["version"] == version
    dates = [date for _, date in changes]
    assert dates == sorted(dates, reverse=True)


def test_the_supported_version_is_this_one():
    version = read_yaml(ROOT / "CITATION.cff")["version"]
    assert f"| {version.rpartition('.')[0]}.x | yes |" in (ROOT / "SECURITY.md").read_text()


def named_targets(page: Path) -> set[str]:
    code = in_code(page.read_text(encoding="utf-8"))
    return {word for part in code for word in re.findall(r"^make ([\w-]+)", part, flags=re.MULTILINE)}


@EVERY_PAGE
def test_commands_of_make_exist(page: Path):
    assert not named_targets(page) - make_targets()


def test_pages_that_name_commands_of_make_are_seen():
    """A search that finds nothing would let everything pass."""
    assert {"demo", "test", "test-fast"} <= named_targets(ROOT / "README.md")
    assert {"test", "test-fast", "mutation", "suite"} <= named_targets(ROOT / "CONTRIBUTING.md")


@pytest.mark.parametrize("target", sorted(make_targets()))
def test_files_that_a_target_runs_exist(target: str):
    """A test that is renamed is renamed there as well."""
    told = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"(?<!\S)(?:tests|benchmarks|examples|ldm|data|text|vae)/[\w/.-]+(?=\s)", told))
    assert not [name for name in named if not (ROOT / name).exists()]
    assert named or target not in {"mutation", "reliability", "test-fast"}


@pytest.mark.parametrize("target", sorted(make_targets()))
def test_targets_that_are_no_files_are_phony(target: str):
    phony = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert target in " ".join(phony).split()


def commands(workflow: Path) -> list[str]:
    jobs = read_yaml(workflow)["jobs"].values()
    return [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines() if line]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_runs_exists(workflow: Path):
    assert commands(workflow)
    for command in commands(workflow):
        program, *words = shlex.split(re.sub(r"\$\{\{.*?\}\}", "x", command))
        if program == "make":
            assert words[0] in make_targets(), command
        else:
            assert (ROOT / program).is_file(), command


def test_both_workflows_are_there():
    assert [path.name for path in WORKFLOWS] == ["test.yml", "weekly.yml"]
    assert "make reliability" in commands(WORKFLOWS[1])


def test_the_shards_of_the_suite_are_all_tests_once():
    """Those of the workflow, and what `make test` runs."""
    shards = read_yaml(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["suite"]["strategy"]["matrix"]["tests"]
    every = {path for path in (ROOT / "tests").rglob("test_*.py")}
    found = [path for shard in shards for word in shard.split() for path in files_of(word)]
    assert len(found) == len(set(found)) and set(found) == every
    (words,) = re.findall(r"^TESTS := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {path for word in words.split() for path in files_of(word)} == every


def test_the_fast_tests_exist():
    plan = subprocess.run(["make", "-n", "test-fast"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in plan.splitlines() if "pytest" in line]
    words = [word for word in shlex.split(line) if word.startswith("tests/")]
    assert words and all(files_of(word) for word in words)


def files_of(pattern: str) -> list[Path]:
    """The files of tests that a word of a command line names: a file, a folder, or a glob of either."""
    found = [path for path in sorted(ROOT.glob(pattern.rstrip("/"))) if path.is_dir() or not pattern.endswith("/")]
    return [file for path in found for file in ([path] if path.is_file() else path.rglob("test_*.py"))]


def prose(page: Path) -> str:
    """Return a page without its code, in which brackets are not links."""
    return re.sub(r"`[^`\n]+`", "", BLOCK.sub("", page.read_text(encoding="utf-8")))


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the files of this repository that a page links to, each with its anchor, "" if there is none."""
    found = [link.partition("#") for link in re.findall(r"\]\(([^()\s]+)\)", prose(page)) if ":" not in link]
    return [((page.parent / name).resolve() if name else page, anchor) for name, _, anchor in found]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY_PAGE
def test_links_between_files_lead_somewhere(page: Path):
    assert not [str(target) for target, _ in links(page) if not target.exists()]
    assert not [f"{target.name}#{anchor}" for target, anchor in links(page) if anchor and anchor not in anchors(target)]


def test_links_are_found():
    """A search that finds nothing would let everything pass."""
    assert {target.name for target, _ in links(ROOT / "README.md")} >= {"gallery.png", "training.md", "CONTRIBUTING.md"}
    assert (ROOT / "docs" / "interchange.md", "in-diffusers") in links(ROOT / "docs" / "training.md")
    assert anchors(ROOT / "docs" / "mathematics.md") >= {"5-drawing", "7-why-not-in-pixels-the-autoencoder"}


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        new = {target for page in new for target, _ in links(page) if target.suffix == ".md"} - reached
    assert set((ROOT / "docs").glob("*.md")) <= reached


@pytest.mark.parametrize("name", ["CITATION.cff", ".pre-commit-config.yaml"])
def test_yaml_of_other_tools_parses(name: str):
    assert isinstance(read_yaml(ROOT / name), dict)


def test_hooks_leave_data_and_weights_alone():
    excluded = re.compile(read_yaml(ROOT / ".pre-commit-config.yaml")["exclude"])
    assert excluded.search("data/emoji64/train/00000.tar.gz") and excluded.search("weights/emoji64/foundry.yaml")
    assert not excluded.search("data/loader.py") and not excluded.search("tests/data/test_emoji64.py")


@pytest.mark.parametrize("template", ["bug.md", "feature.md"])
def test_issue_templates_have_a_heading(template: str):
    _, heading, text = (ROOT / ".github" / "ISSUE_TEMPLATE" / template).read_text().split("---\n", 2)
    assert yaml.safe_load(heading).keys() == {"name", "about", "labels"} and text.strip()


@pytest.mark.parametrize("package", ["ldm", "vae", "text", "data"])
def test_packages_say_that_they_are_typed(package: str):
    assert (ROOT / package / "py.typed").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in settings["*"]
