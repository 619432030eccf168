"""The pages of the comparison say what its records do."""

from collections.abc import Callable
from pathlib import Path

import pytest

import make_findings
import make_page
from comparison_setting import COMPARISON
from forked import run_python


def test_without_records_no_page_is_written(tmp_path: Path) -> None:
    page = str(tmp_path / "results.md")
    done = run_python(str(COMPARISON / "make_page.py"), "--results", str(tmp_path), "--page", page)
    assert done.returncode == 1
    assert "nothing is measured yet, and nothing was written" in done.stderr
    assert not list(tmp_path.iterdir())


def test_equal_time_reads_between_scores() -> None:
    rows = [{"seconds": 10.0, "distance": 8.0}, {"seconds": 20.0, "distance": 4.0}, {"seconds": 40.0, "distance": 3.0}]
    read_at: Callable[[float], float | None] = lambda s: make_page.at_seconds({"evaluations": rows}, s)  # noqa: E731
    assert [read_at(seconds) for seconds in (5, 10, 15, 30, 50)] == [None, 8.0, 6.0, 3.5, 3.0]


@pytest.mark.parametrize(("name", "text"), make_findings.PAGES.items())
def test_the_findings_are_those_of_the_records(name: str, text: str) -> None:
    made = make_findings.page(make_page.read_records(COMPARISON / "results"), (COMPARISON / text).read_text())
    assert made == (make_findings.DOCS / name).read_text()
    assert "{" not in made


@pytest.mark.parametrize(("name", "folder"), make_findings.GRIDS.items())
def test_the_pictures_are_those_of_the_records(name: str, folder: str) -> None:
    made = COMPARISON / "results" / f"{name}-grid.png"
    assert made.read_bytes() == (make_findings.DOCS / folder / f"{name}.png").read_bytes()


def test_students_are_compared_with_the_most_steps_of_their_teacher() -> None:
    """Each number of the tables comes from its own row of the record; records that are not there yet are left out."""
    ways = [
        ("teacher", "unipc", 4),
        ("teacher", "unipc", 25),
        ("teacher", "ancestral", 4),
        ("teacher", "ancestral", 25),
    ]
    ways += [("4", "ancestral", 4), ("4", "ancestral", 25)]
    points = [
        {"who": who, "sampler": sampler, "steps": steps, "distance": place + 1.0, "precision": 0.5, "recall": 0.25,
         "squeezenet": {"distance": 10.0 * (place + 1), "precision": 0.75, "recall": 0.125},
         "vgg16": {"distance": 100.0, "precision": 1.0, "recall": 0.0}, "sampling_s": 1.0}
        for place, (who, sampler, steps) in enumerate(ways)
    ]  # fmt: skip
    curve = [{"seconds": 1.0, "compile_s": 2.0}, {"seconds": 7.0}]
    record = {"points": points, "curve": curve, "settings": {"scale": {"few_steps": [4, 25]}}}
    records = {"distill-nano": record}
    assert make_findings.students_table(records, "distill-nano")[2:6] == [
        "| teacher | `unipc` | 25 | 2 | 0.5 | 0.25 | 20 | 0.75 | 0.125 | 100 | 1 | 0 |",
        "| teacher | `unipc` | 4 | 1 | 0.5 | 0.25 | 10 | 0.75 | 0.125 | 100 | 1 | 0 |",
        "| student | `ancestral` | 25 | 6 | 0.5 | 0.25 | 60 | 0.75 | 0.125 | 100 | 1 | 0 |",
        "| student | `ancestral` | 4 | 5 | 0.5 | 0.25 | 50 | 0.75 | 0.125 | 100 | 1 | 0 |",
    ]
    ratios = make_findings.ratios_table(records)
    assert ratios[0] == "|  | teacher, 4 | student, 4 |"
    assert ratios[2] == "| noise prediction, clothes | 0.50 | 2.50 |"
    assert make_findings.times_table(records)[2] == "| noise prediction | 2 | 7 | 6 |"
    text = "\n".join(make_findings.distillation(records))
    assert "Noise prediction ([record]" in text
    assert "distillation/distill-nano.png" in text
    assert "low matching" not in text
    assert make_findings.distillation({}) == []
