"""The report holds the numbers, refers to nothing outside itself, and lets no text become markup."""

from __future__ import annotations

import copy
import html.parser
import json
import math
import re

import numpy as np
import pytest

from meetjax.errors import MeetjaxError
from meetjax.evaluate import plots
from meetjax.evaluate.report import write_report
from meetjax.evaluate.summary import write_summary

STRENGTHS = (-1, 0, 0.5, 1, 1.5, 2)
HOSTILE = """<script>alert("x")</script><img src='http://evil.example/a.png' onerror=alert(1)>&amp;"""


def make_summary(kinds=("prompt", "lora", "edit", "identity")) -> dict:
    entries = {}
    for i, kind in enumerate(kinds):
        curve = [{"strength": s, "mean_tokens": 60 - 20 * s - i, "reward_margin": 9.0 * s + i, "kl": s * s * 0.2} for s in STRENGTHS]
        entries[kind] = {
            "held_out_accuracy": 0.9 + 0.01 * i,
            "interval": [0.781, 0.957],
            "n": 1048,
            "train_s": 61.4,
            "steps": 1200,
            "final_loss": 0.01234,
            "curve": curve,
            "losses": [math.log(2), 0.5, 0.3, 0.1],
        }
    return {
        "model": "smollm2-135m-instruct",
        "trained_parameters": {kind: 3540096 + i for i, kind in enumerate(kinds)},
        "wall_s": 512.3,
        "peak_rss_gb": 3.214,
        "command": "meetjax demo",
        "versions": {"jax": "0.10.2"},
        "times": {"train": 200.0, "sweep": 90.0},
        "untrained": {"held_out_accuracy": 0.5, "n": 1048, "interval": [0.47, 0.53]},
        "baseline_shorter_accuracy": 0.875,
        "kinds": entries,
    }


def make_samples(prompt="Why is the sky blue?", text="Because air scatters blue light most.") -> list[dict]:
    return [{"prompt": prompt, "kind": kind, "answers": {str(s): f"{text} {s}" for s in STRENGTHS}} for kind in ("prompt", "lora")]


class Page(html.parser.HTMLParser):
    """Tags with attributes, and the visible text; checks that tags are closed in order."""

    VOID = ("meta", "br", "img", "link", "input")
    TEXTLESS = ("style", "script")

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.words, self.open, self.ids = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in self.TEXTLESS:
            self.words.append(data)


def render(tmp_path, summary, samples) -> tuple[str, Page]:
    path = write_report(summary, samples, tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    page = path.read_text(encoding="utf-8")
    return page, Page(page)


def test_report_refers_to_nothing_outside_itself(tmp_path):
    page, parsed = render(tmp_path, make_summary(), make_samples())
    assert re.findall(r"(?i)https?:|//\w|@import|url\((?!#)", page) == []
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for _, attrs in parsed.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attrs.get(name, "#").startswith("#")


def test_every_reference_inside_the_page_resolves_once(tmp_path):
    page, parsed = render(tmp_path, make_summary(), make_samples())
    assert len(parsed.ids) == len(set(parsed.ids))
    targets = set(re.findall(r'(?:url\(#|href="#)([^")]+)', page))
    assert targets and targets <= set(parsed.ids)


def test_report_contains_the_numbers(tmp_path):
    page, parsed = render(tmp_path, make_summary(), make_samples())
    text = " ".join(" ".join(parsed.words).split())
    expected = (
        "3,540,096",
        "1,048",
        "1,200",
        "90.0 %",
        "93.0 %",
        "78.1 – 95.7 %",
        "87.5 %",
        "1 min 01 s",
        "0.0123",
        "3.21 GB",
        "8 min 32 s",
    )
    for number in (*expected, "smollm2-135m-instruct", "meetjax demo", "0.10.2", "Because air scatters blue light most. 0.5"):
        assert number in text, number
    for title in (
        "mean answer length (tokens)",
        "implicit reward margin (nats)",
        "KL to the base (nats per token)",
        "training loss (nats)",
    ):
        assert title in text, title
    assert sum(tag == "svg" and attrs.get("role") == "img" for tag, attrs in parsed.tags) == 4
    for kind in ("prompt", "lora", "edit", "identity"):  # a direct label in each of the four plots, at least
        assert len(re.findall(rf"<text [^>]*>{kind}</text>", page)) == 4


def test_report_reads_on_a_phone_in_light_and_dark(tmp_path):
    page, parsed = render(tmp_path, make_summary(), make_samples())
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.tags
    assert "prefers-color-scheme: dark" in page
    used = set(re.findall(r"var\((--[\w]+)\)", page))
    style = page[page.index("<style>") : page.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    assert all(f"{name}:" in light for name in used)
    assert all(f"{name}:" in dark for name in used - {"--font", "--mono"})
    assert not any(colour in page for colour in plots.VARIABLES)


def test_hostile_text_stays_text(tmp_path):
    summary = make_summary()
    summary["model"] = summary["command"] = HOSTILE
    summary["versions"] = {HOSTILE: HOSTILE}
    summary["times"] = {HOSTILE: 1.0}
    summary["kinds"][HOSTILE] = copy.deepcopy(summary["kinds"]["lora"])
    summary["trained_parameters"][HOSTILE] = 7
    samples = [*make_samples(HOSTILE, HOSTILE), {"prompt": HOSTILE, "kind": HOSTILE, "answers": {1.0: HOSTILE}}]
    _, parsed = render(tmp_path, summary, samples)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in parsed.tags)
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert "".join(parsed.words).count('<script>alert("x")</script>') >= 8


def test_prompts_with_html_in_common_are_shown_as_written(tmp_path):
    _, parsed = render(tmp_path, make_summary(), make_samples("What does <b> & </b> mean?", "It $does$ bold_{x}."))
    assert "What does <b> & </b> mean?" in "".join(parsed.words)
    assert "It $does$ bold_{x}. 0.5" in "".join(parsed.words)


def test_samples_share_columns_and_say_what_is_missing(tmp_path):
    samples = [
        {"prompt": "p", "kind": "lora", "answers": {0: "one two", 2.0: "x"}},
        {"prompt": "p", "kind": "edit", "answers": {"-0.5": "y"}},
    ]
    page, parsed = render(tmp_path, make_summary(), samples)
    assert re.findall(r'<th class="answer">([^<]*)</th>', page) == ["−0.5", "0 (base)", "2"]
    assert "".join(parsed.words).count("not sampled") == 3
    assert "2 words" in parsed.words and "1 word" in parsed.words


def test_unmeasured_points_are_left_out_of_a_line(tmp_path):
    summary = make_summary()
    for point in summary["kinds"]["lora"]["curve"]:
        point["kl"] = None if point["strength"] > 1 else point["kl"]
    summary["kinds"]["edit"]["curve"] = []
    summary["kinds"]["edit"]["losses"] = []
    page, _ = render(tmp_path, summary, [])
    assert len(re.findall(r"<text [^>]*>edit</text>", page)) == 0
    assert len(re.findall(r"<text [^>]*>lora</text>", page)) == 4


def test_missing_field_is_named(tmp_path):
    summary = make_summary()
    del summary["kinds"]["edit"]["curve"][2]["kl"]
    with pytest.raises(MeetjaxError, match=r"kinds\.edit\.curve\[2\]\.kl"):
        write_report(summary, [], tmp_path)
    with pytest.raises(MeetjaxError, match=r"samples\[0\]"):
        write_report(make_summary(), [{"prompt": "p"}], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_report_is_a_function_of_its_input(tmp_path):
    first = write_report(make_summary(), make_samples(), tmp_path / "a").read_bytes()
    assert write_report(make_summary(), make_samples(), tmp_path / "b").read_bytes() == first


def test_summary_round_trip_and_report_from_it(tmp_path):
    summary = make_summary()
    summary["kinds"]["lora"]["final_loss"] = np.float32(0.25)
    summary["kinds"]["lora"]["losses"] = np.asarray([0.5, 0.25], np.float32)
    summary["kinds"]["edit"]["curve"][0]["kl"] = math.nan
    path = write_summary(summary, tmp_path)
    back = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "summary.json"
    assert back["kinds"]["lora"]["final_loss"] == 0.25
    assert back["kinds"]["lora"]["losses"] == [0.5, 0.25]
    assert back["kinds"]["edit"]["curve"][0]["kl"] is None
    assert back["trained_parameters"] == summary["trained_parameters"]
    assert write_report(back, make_samples(), tmp_path).stat().st_size > 10_000


def test_summary_write_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    write_summary({"model": "old"}, tmp_path)
    monkeypatch.setattr("meetjax.evaluate.summary.os.replace", _no_space)
    with pytest.raises(MeetjaxError, match=r"summary\.json: cannot write.*No space"):
        write_summary({"model": "new"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"model": "old"}


def test_summary_refuses_what_json_cannot_hold(tmp_path):
    with pytest.raises(MeetjaxError, match=r"summary\.kinds\.lora\.curve\[0\].*object"):
        write_summary({"kinds": {"lora": {"curve": [object()]}}}, tmp_path)


def _no_space(*_):
    raise OSError(28, "No space left on device")
