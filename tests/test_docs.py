"""What the documentation names is there: files that it links to, experiments, presets and programs in its commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_discussion" not in page.name),
]  # a study's discussion is a part of its page


def _links(page: Path) -> list[str]:
    text = re.sub(r"(?m)^ {4}.*$", "", page.read_text())  # code has brackets of its own
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def missing_from(page: Path) -> list[str]:
    """Name what a page links to or calls and the repository does not have."""
    text = page.read_text()
    wanted = {link: page.parent / link.partition("#")[0] for link in _links(page)}
    groups = {"experiment": "experiment", "preset": "study", "sweep": "sweep", "recipe": "recipe"}
    for option, group in groups.items():
        for name in re.findall(rf"\b{option}=([a-z0-9_/]+)", text):
            wanted[f"{option}={name}"] = ROOT / "conf" / group / f"{name}.yaml"
    for package, name in re.findall(r"\b(launch|benchmarks)\.([a-z_]+)", text):
        wanted[f"{package}.{name}"] = ROOT / package / f"{name}.py"
    return [name for name, path in wanted.items() if not path.exists()]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_what_a_page_names_is_there(page):
    assert missing_from(page) == []


def test_a_wrong_name_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "[gone](gone.md) [page](page.md) `launch.tarin experiment=quickstart` preset=smal\n"
    )
    assert missing_from(page) == ["gone.md", "preset=smal", "launch.tarin"]


def test_the_readme_leads_to_every_page():
    linked = {(page.parent / link).resolve() for page in PAGES for link in _links(page)}
    assert [page.name for page in PAGES[1:] if page not in linked] == []
