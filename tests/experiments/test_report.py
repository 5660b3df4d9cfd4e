"""The report of a comparison: numbers by hand from rows made by hand, and pages that hold together."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.report import regime, tables, words
from experiments.report.__main__ import main
from experiments.report.blocks import Bullets, Shown, Text, flat
from experiments.report.data import Curve, Results, missing, read, read_rows
from experiments.report.measures import (
    adaptive_ratios,
    best_coded,
    closest_asynchronous,
    finals,
    regret,
    target,
    time_ratio,
    time_to,
    times_to,
)
from experiments.report.sections import page

ACCURACIES = {0: [0.1, 0.5, 0.8, 0.8, 0.8], 1: [0.1, 0.5, 0.7, 0.7, 0.7]}
LEVEL = 0.75 - 0.1 / np.sqrt(2)  # mean of the finals 0.8 and 0.7, minus their sample standard deviation
LAW = "slow-owners"


def row(law: str, scheme: str, seed: int, result: dict[str, Any], options: tuple[Any, ...] = ()) -> dict[str, Any]:
    task = {"problem": "digits", "law": law, "scheme": scheme, "seed": seed, "rounds": 4, "options": options}
    name = f"{law}/{scheme}/{seed}/{options}"
    return {"hash": name, "task": task, **result, "real-seconds": 1.0, "versions": {"numpy": "2"}, "commit": "abc"}


def points(accuracies: list[float], seconds: float) -> dict[str, Any]:
    evaluations = [
        {"round": i, "seconds": i * seconds, "loss": 1.0, "accuracy": a, "worst": a / 2, "owned": a / 4}
        for i, a in enumerate(accuracies)
    ]
    return {"points": evaluations, "work": work(48.0)}


def work(shards: float) -> dict[str, float]:
    return {"messages": 48, "shards": shards, "megabytes-up": shards / 10, "megabytes-down": shards / 10}


def times(seconds: float, shards: float, seed: int) -> dict[str, Any]:
    jobs = (
        [[w, r, (r - 1) * seconds, r * seconds - 0.1 * w] for r in range(1, 5) for w in range(12)] if not seed else []
    )
    return {"seconds": [seconds] * 4, "work": work(shards), "jobs": jobs, "used": [list(range(6))] * 4, "ways": []}


def rows_by_hand() -> list[dict[str, Any]]:
    rows = [row("", "exact", seed, points(ACCURACIES[seed], 1.0)) for seed in (0, 1)]
    for seed in (0, 1):
        rows += [
            row(LAW, "wait", seed, {k: v for k, v in times(10.0, 48, seed).items() if k != "used"}),
            row(LAW, "partial", seed, times(2.0, 60, seed)),
            row(LAW, "cyclic", seed, times(12.0, 144, seed)),
            row(LAW, "adaptive", seed, times(2.0 + seed, 60, seed)),
            row(LAW, "semi", seed, points([0.1, 0.6, 0.6, 0.6, 0.6], 1.0)),
            row(LAW, "drop-owners", seed, points([0.1, 0.3, 0.4, 0.4, 0.4], 1.0)),
        ]
        settings = (["server-rate", 1.0], ["staleness", 0.5])
        rows.append(row(LAW, "fedbuff", seed, points([0.1, 0.6, 0.64, 0.65, 0.66], 0.5), settings))
    means = {"wait for all": 10.0, "partial work, s = 2": 2.1, "repetition, s = 2": 2.0}
    verdict = {"means": means, "planned": "partial work, s = 2", "codes": True, "verdict": "code: it is faster."}
    rows.append(row(LAW, "hindsight", 0, verdict))
    rows.append(row(LAW, "fedbuff", 100, points([0.1, 0.2, 0.2, 0.2, 0.2], 0.5), (["server-rate", 3.0],)))
    return rows


def results_by_hand() -> Results:
    (results,) = read(rows_by_hand())
    return results


def curve(accuracies: list[float]) -> Curve:
    values = np.array(accuracies, dtype=np.float64)
    return Curve(np.arange(len(values)), np.arange(0.0, 10.0 * len(values), 10.0), values, values, None)


@pytest.mark.parametrize(
    ("accuracies", "seconds"),
    [
        ([0.1, 0.5, 0.9, 0.9, 0.9], 12.5),  # a quarter of the way from 0.5 to 0.9
        ([0.1, 0.2, 0.3], None),
        ([0.1, 0.7, 0.7, 0.5, 0.5, 0.5], None),  # two evaluations are not enough
        ([0.1, 0.7, 0.7, 0.5, 0.7, 0.7], 35.0),  # the last two are: the run ends
        ([0.1, 0.5, 0.7], 15.0),
        ([0.6, 0.6, 0.6, 0.1], 0.0),
    ],
)
def test_the_target_counts_when_it_is_held(accuracies: list[float], seconds: float | None) -> None:
    found = time_to(curve(accuracies), 0.6)
    assert (found is None) if seconds is None else found == pytest.approx(seconds)


def test_the_target_is_the_mean_of_waiting_minus_its_standard_deviation() -> None:
    goal = target(results_by_hand())
    assert goal is not None
    assert goal.level == pytest.approx(LEVEL)
    assert goal.waiting.values == pytest.approx((0.8, 0.7))


def test_an_exact_scheme_has_the_common_models_at_its_own_times() -> None:
    results = results_by_hand()
    share = [(LEVEL - 0.5) / 0.3, (LEVEL - 0.5) / 0.2]
    found = times_to(results.laws[LAW]["partial"], LEVEL)
    assert [found[0], found[1]] == pytest.approx([2 * (1 + one) for one in share])
    ratio = time_ratio(results.laws[LAW]["partial"], results.laws[LAW]["wait"], LEVEL)
    assert ratio is not None and ratio.values == pytest.approx((0.2, 0.2))


def test_the_best_coded_scheme_the_closest_baseline_and_those_that_never_arrive() -> None:
    schemes = results_by_hand().laws[LAW]
    best = best_coded(schemes, LEVEL)
    assert best is not None and best[0] == "partial"
    closest = closest_asynchronous(schemes, LEVEL)
    assert closest is not None and closest.scheme == "fedbuff"
    assert closest.above == pytest.approx(0.65 - LEVEL)
    assert list(times_to(schemes["drop-owners"], LEVEL).values()) == [None, None]
    owned = finals(schemes["drop-owners"], "owned")
    assert owned is not None and owned.mean == pytest.approx(0.1)


def test_the_planner_and_adaptive_are_held_against_their_bounds() -> None:
    results = results_by_hand()
    planned, best, more = regret(results.hindsight[LAW])
    assert (planned, best) == ("partial work, s = 2", "repetition, s = 2") and more == pytest.approx(1.05)
    ratios = adaptive_ratios(results, LAW, target(results))
    assert [ratio for ratio, _ in ratios.values()] == pytest.approx([0.2, 0.3])
    assert all(reached for _, reached in ratios.values())
    text = " ".join(words.checks([results], {"digits": target(results)}))
    assert "1.050" in text and "0.300" in text and "seed 1" in text


def test_tuning_is_no_part_of_the_curves() -> None:
    results = results_by_hand()
    assert [found["task"]["seed"] for found in results.tuning] == [100]
    assert sorted(results.laws[LAW]["fedbuff"]) == results.seeds == [0, 1]


def test_a_baseline_that_was_given_longer_has_a_table_of_its_own() -> None:
    longer = row(LAW, "semi", 0, points([0.1, 0.6, 0.9, 0.9, 0.9], 10.0), (["as-long-as-waiting", 1.0],))
    (results,) = read([*rows_by_hand(), longer])
    usual = finals(results.laws[LAW]["semi"])
    assert usual is not None and usual.mean == pytest.approx(0.6)
    (line,) = tables.long(results, target(results)).rows
    assert line[:2] == ["semi-asynchronous", "90.0"]


def test_the_last_file_counts_and_a_line_that_was_cut_off_does_not(tmp_path: Path) -> None:
    old, new = rows_by_hand()[0], {**rows_by_hand()[0], "commit": "newer"}
    (tmp_path / "old").write_text(json.dumps(old) + "\n" + json.dumps(old)[:40])
    (tmp_path / "new").write_text(json.dumps(new) + "\n")
    assert [found["commit"] for found in read_rows([tmp_path / "old", tmp_path / "new"])] == ["newer"]


@pytest.mark.parametrize(
    ("left_out", "says"),
    [
        (("exact",), "no target"),
        (("wait",), "its round times have no row yet"),
        (("partial", "cyclic", "adaptive"), "No coded scheme"),
        (("semi", "fedbuff", "drop-owners"), "No baseline that loses"),
        (("wait", "partial", "cyclic", "adaptive", "semi", "fedbuff", "drop-owners", "hindsight"), "Rows are missing"),
        (("exact", "wait", "partial", "cyclic", "adaptive", "semi", "fedbuff", "drop-owners"), "Rows are missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_what_is_missing_is_said_and_the_rest_is_drawn(left_out: tuple[str, ...], says: str) -> None:
    rows = [one for one in rows_by_hand() if one["task"]["scheme"] not in left_out]
    _, blocks = page(rows, {"digits": Path("rows.jsonl")}, None, "python -m experiments.report")
    paragraphs = [block.text for block in flat(blocks) if isinstance(block, Text)]
    text = " ".join(paragraphs + [one for block in flat(blocks) if isinstance(block, Bullets) for one in block.items])
    assert says in text and "Rows are missing" in text
    for block in flat(blocks):
        if isinstance(block, Shown):
            block.figure.draw_without_rendering()


def test_one_seed_has_no_spread_and_missing_seeds_are_named() -> None:
    rows = [one for one in rows_by_hand() if one["task"]["seed"] == 0]
    (results,) = read(rows)
    goal = target(results)
    assert goal is not None and goal.level == pytest.approx(0.8)
    assert "nothing is subtracted" in words.target_sentence(goal)
    few, many, which = missing(results)
    assert few == many - len(rows)
    assert "partial (seed 1, 2)" in which and "phones: all" in which


def test_without_rows_one_sentence_says_what_makes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["--rows", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "report")]) == 2
    said = capsys.readouterr().out
    assert "There are no rows" in said and "python -m experiments.compare --suite quick" in said
    assert not (tmp_path / "report").exists()


class Page(HTMLParser):
    """Its words outside figures, styles and contents, its attributes, and whether each tag is closed in turn."""

    VOID = frozenset(("meta", "br", "img", "link"))

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"svg", "style", "title", "nav"} & set(self.open):
            self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pages of the rows by hand."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows_by_hand()))
    assert main(["--rows", str(folder / "rows.jsonl"), "--out", str(folder), "--no-map"]) == 0
    return folder


def test_the_html_page_parses_and_asks_for_nothing(written: Path) -> None:
    source = (written / "report.html").read_text()
    found = Page(source)
    assert found.open == []
    links = [value for name, value in found.attributes if name in ("src", "href", "xlink:href")]
    assert links and all(value.startswith(("#", "data:")) for value in links)
    assert not re.search(r"https?:|@import|<script|<link|url\((?!#)", source)
    ids = Counter(value for name, value in found.attributes if name == "id")
    assert {value for name, value in found.attributes if name == "href" and value != "#"} <= {f"#{one}" for one in ids}
    assert [name for name, count in ids.items() if count > 1] == []


def test_figures_have_a_caption_and_the_commands_stand_once_at_the_end(written: Path) -> None:
    source, markdown = (written / "report.html").read_text(), (written / "report.md").read_text()
    figures = re.findall(r"<figure>.*?</figure>", source, re.DOTALL)
    parts = re.split(r"^!\[.*?\]\((.*?)\)$", markdown, flags=re.MULTILINE)[1:]
    assert len(figures) == len(parts) // 2 == 5
    assert all(re.search(r"<figcaption>[^<]+</figcaption>", figure) for figure in figures)
    for image, after in zip(parts[::2], parts[1::2], strict=True):
        assert (written / image).read_bytes().startswith(b"\x89PNG")
        assert re.match(r"\n\n[^\n]+\n", after)
    assert source.count("<pre>") == markdown.count("```bash") == 1
    assert re.search(r"```bash\npython -m experiments.compare .*\npython -m experiments.report .*\n```\s*$", markdown)


def test_the_page_begins_with_its_summary_and_details_are_folded(written: Path) -> None:
    markdown = (written / "report.md").read_text()
    assert re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)[1] == "Summary"
    assert "0.20 ± 0.00" in markdown.split("\n## ")[1], "the time of the fastest code, of waiting for all"
    # Partial work is faster than waiting; semi-asynchronous and FedBuff do not reach the target with every seed.
    assert "at least 5 % faster than waiting for all in 1, and slower in 0" in markdown
    assert "In 0 of the 1, a baseline" in markdown
    folds = re.findall(r"<details><summary>(.*?)</summary>\n\n(.*?)</details>", markdown, re.DOTALL)
    assert len(folds) == markdown.count("<details>") >= 3
    assert all(not re.search(r"^#", inside, re.MULTILINE) for _, inside in folds), "a heading would be hidden"


def test_a_figure_that_would_show_noise_is_left_out_and_named() -> None:
    flat_rows = [
        {**one, "points": [{**point, "accuracy": 0.5 + 0.1 * one["task"]["seed"]} for point in one["points"]]}
        if "points" in one
        else one
        for one in rows_by_hand()
    ]
    _, blocks = page(flat_rows, {"digits": Path("rows.jsonl")}, None, "python -m experiments.report")
    names = [block.name for block in flat(blocks) if isinstance(block, Shown)]
    assert names == ["digits-timelines", "digits-work"]
    assert any("seeds differ by 10.0 points" in block.text for block in flat(blocks) if isinstance(block, Text))


def test_both_pages_have_the_same_numbers_and_those_by_hand(written: Path) -> None:
    markdown = (written / "report.md").read_text()
    text = re.sub(r"\(images/.*?\)", "", markdown)
    number = r"\d+(?:\.\d+)?"
    assert Counter(re.findall(number, text)) == Counter(
        re.findall(number, " ".join(Page((written / "report.html").read_text()).words))
    )
    (line,) = re.findall(r"^\| partial work \| exact .*$", markdown, re.MULTILINE)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == "75.0 ± 7.1"
    assert cells[5] == "8.00 ± 0.00"
    assert cells[7:9] == ["0.20 ± 0.00", "60.0 ± 0.0"]
    assert "| FedBuff | all data, stale | 65.0 ± 0.0 |" in markdown
    assert f"{100 * (LEVEL - 0.65):.1f} points below it" in markdown


def test_the_map_finds_where_coding_loses_and_where_it_wins() -> None:
    regimes = regime.compute(6, shares=(0.0, 1.0), heavy=(0.0, 0.1), light=(0.0,), runs=2, rounds=40)
    (even,) = regimes.cells["coded", "light"]
    assert [cell.label for cell in even] == ["no code", "no code"]
    assert even[0].speedup == pytest.approx(1.0)  # all alike, and a second shard costs nothing
    assert even[1].speedup == pytest.approx(0.5)  # all alike, and s + 1 = 2 shards take twice as long
    assert regimes.cells["any", "heavy"][1][0].speedup > 2.0
    assert regime.draw(regimes).axes
