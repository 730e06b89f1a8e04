"""Write a study's page from its result files: docs/study/NAME.md with its pictures, NAME.json, and NAME.html beside the
results.

Without a result file the JSON file of an earlier report is read instead, so the repository alone is enough to make the
page again.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from foreroute.engine.errors import UserError, require
from foreroute.launch.page import parts as page
from foreroute.launch.page.html_file import html
from foreroute.launch.page.markdown_file import markdown
from foreroute.launch.page.pictures import save_picture
from foreroute.launch.runs.folder import write_json
from foreroute.launch.study.comparisons import as_json
from foreroute.launch.study.preset import Preset
from foreroute.launch.study.results import Result, arrange, read_results
from foreroute.launch.study.study_page import study_page


def write_report(name: str, preset: Preset, results: Path, docs: Path) -> list[Path]:
    """Write the report; return its files, the page first.

    Args:
        results: folder of the result files.
        docs: folder of the page; NAME_discussion.md in it, written by hand, becomes a part of the page.

    Raises:
        UserError: there are no results, or they cannot be compared.
    """
    found = read_results(results) or _committed(docs / f"{name}.json")
    require(bool(found), f"{results}: no result file, and no {docs / f'{name}.json'}; run the study first")
    arranged = arrange([result for result in found if result["arm"] in preset.arms])
    described = study_page(name, preset, arranged)
    discussion = docs / f"{name}_discussion.md"
    opening = discussion.read_text() if discussion.exists() else ""
    text, pictures = markdown(described, name, opening=opening)
    docs.mkdir(parents=True, exist_ok=True)
    for old in docs.glob(f"{name}-*.svg"):
        old.unlink()
    files = {docs / f"{name}.md": text}
    if results.is_dir():
        files[results.parent / f"{name}.html"] = html(_with_discussion(described, opening))
    for path, content in files.items():
        path.write_text(content)
    for file, curve in pictures.items():
        save_picture(curve, docs / file)
    write_json(docs / f"{name}.json", as_json(name, preset, arranged))
    return [*files, *(docs / file for file in pictures), docs / f"{name}.json"]


def _committed(path: Path) -> list[Result]:
    """Read the result files that an earlier report kept."""
    if not path.exists():
        return []
    try:
        found: list[Any] = json.loads(path.read_text())["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no report of a study ({error})") from error
    return found


def _with_discussion(described: page.Page, text: str) -> page.Page:
    """Put the discussion after the first section, a paragraph for each paragraph and list item, without its markup."""
    plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)  # links
    plain = re.sub(r"(\*{1,2}|`)(?=\S)([^*`]+)\1", r"\2", plain)  # emphasis and code
    parts = re.split(r"\n+\* |\n\n", f"\n{plain}")
    paragraphs = [" ".join(part.split()) for part in parts if part.strip()]
    if not paragraphs:
        return described
    first, *others = described.sections
    return replace(described, sections=[first, page.Section("Discussion", paragraphs), *others])
