"""Tests of README.md, CONTRIBUTING.md and docs/: programs, configurations, links, named tests, and their scripts."""

from __future__ import annotations

import json
import re

import pytest
from doc_pages import DOCS, LINKED, PAGES, blocks, functions_of_tests, load_script
from PIL import Image
from tiny import ROOT

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config

# Programs, configurations, files


@pytest.mark.parametrize("program", blocks("python"))
def test_programs_compile(program):
    compile(program, "docs", "exec")


@pytest.mark.parametrize("yaml", [block for block in blocks("yaml") if block.startswith("data:")])
def test_yaml_is_configuration(yaml, tiny_yaml):
    text = re.sub(r"^data: .*\n", "", tiny_yaml.read_text(), flags=re.M)
    tiny_yaml.write_text(text + yaml)
    load_config(str(tiny_yaml), [], PretrainConfig)


# Links and names


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_are_there(page):
    """Pages name test functions, not their modules, or a path below tests/."""
    for path in re.findall(r"\btests/[\w/.]+", PAGES[page]):
        assert (ROOT / path.rstrip(".")).exists(), path
    named = set(re.findall(r"(?<!/)\b(test_\w+)\b(?!\.py)", PAGES[page]))
    assert not named - functions_of_tests()


def test_each_row_of_the_reliability_page_names_a_test():
    text = PAGES[DOCS / "reliability.md"]
    assert len(set(re.findall(r"\btest_\w+", text))) > 25
    tables = re.findall(r"^\|.*\| tests? .*\|\n\| [-| ]+\|\n((?:\|.*\n)+)", text, re.M)
    assert len(tables) == 3
    for row in "".join(tables).splitlines():
        assert re.search(r"`test_\w+|\| the same \|$", row), row


def test_the_readme_is_short():
    text = PAGES[ROOT / "README.md"]
    assert len(text.splitlines()) <= 120
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for paragraph in re.split(r"\n\s*\n", prose):
        if not paragraph.lstrip().startswith(("|", "-", "#")):
            assert len(paragraph.strip().splitlines()) <= 5, paragraph


# Generated parts


def test_the_list_of_workarounds_is_up_to_date():
    assert load_script("docs/list_workarounds.py").main(["--check"]) == 0


def test_workarounds_are_collected_from_comments(tmp_path):
    script = load_script("docs/list_workarounds.py")
    (tmp_path / "electra_composer").mkdir()
    code = (
        "x = 1  # Workaround (torch 2.7): one line; goes when fixed.\n"
        "# a comment\n"
        "# Workaround (composer 0.32): two lines | and\n"
        "# a bar. Goes when Composer\n"
        "# says so.\n"
        "# Another comment.\n"
        'text = "# Workaround (numpy 2): in a string; goes when never."\n'
    )
    (tmp_path / "electra_composer/a.py").write_text(code)
    found = script.collect(tmp_path, ("electra_composer",))
    assert [row[:5] for row in found] == [
        ("composer", "electra_composer/a.py", 3, "0.32", "two lines | and a bar"),
        ("torch", "electra_composer/a.py", 1, "2.7", "one line"),
    ]
    assert found[0].condition == "Composer says so"
    page = script.updated("# A\n\ntext\n\n## Workarounds\n\nold\n\n## Next\n\nmore\n", found)
    assert page.startswith("# A\n\ntext\n\n## Workarounds\n")
    assert page.endswith("\n\n## Next\n\nmore\n")
    assert "old" not in page
    assert r"two lines \| and a bar" in page
    assert script.updated(page, found) == page
    assert "None." in script.updated("# A\n", [])
    (tmp_path / "electra_composer/b.py").write_text("# Workaround (torch): no version; goes when fixed.\n")
    with pytest.raises(ValueError, match=r"electra_composer/b\.py:1: .*expected '# Workaround"):
        script.collect(tmp_path, ("electra_composer",))


def test_the_picture_is_drawn_from_a_metrics_file(tmp_path, capsys):
    script = load_script("docs/make_picture.py")
    rows = [
        {"step": step, "metrics/train/mlm_loss": 9 - step / 10, "metrics/train/rtd_loss": 0.6} for step in range(40)
    ]
    rows[-1] |= {"metrics/eval/mlm_loss": 5.0, "metrics/eval/rtd_loss": 0.5, "metrics/eval/rtd_auc": 0.7}
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    out = tmp_path / "curves.png"
    script.main([str(tmp_path), "--out", str(out)])
    assert out.stat().st_size < 60_000
    with Image.open(out) as image:
        assert image.width > 2 * image.height
        assert image.convert("RGBA").getpixel((0, 0))[3] == 0  # transparent
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "none"), "--out", str(out)])
    assert "expected the folder of a pretraining run" in capsys.readouterr().err


def test_the_picture_of_the_readme_is_small():
    assert (DOCS / "curves.png").stat().st_size < 60_000
