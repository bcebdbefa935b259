"""The metrics log has each step once whatever happened before, and tells its speed without the compile time."""

from __future__ import annotations

import io
import json
import math
import struct

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from meetjax.errors import MeetjaxError
from meetjax.train.metrics import MetricsLog, peak_rss_gb, read_metrics


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def read_events(folder) -> list[Event]:
    """Every event of every file, by the format: length, its checksum, the event, its checksum."""
    events = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return events


def log_steps(folder, first, last, start_step=0, total=9):
    with MetricsLog(folder, total, start_step, console=quiet()) as log:
        for step in range(first, last + 1):
            log.write(step, {"loss": 1.0 / step, "rewards/accuracies": np.float32(0.5)}, examples=2, tokens=64)


def test_each_step_is_written_as_it_ends(tmp_path):
    with MetricsLog(tmp_path, 3, console=quiet()) as log:
        log.write(1, {"loss": 0.5, "grad_norm": 2})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "grad_norm": 2.0}]
        log.write(2, {"loss": 0.25})
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_resume_drops_later_rows(tmp_path):
    log_steps(tmp_path, 1, 6)
    log_steps(tmp_path, 4, 8, start_step=3)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["loss"] for row in rows] == [1.0 / step for step in range(1, 9)]


def test_resume_drops_a_row_cut_short(tmp_path):
    log_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    log_steps(tmp_path, 4, 4, start_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_new_run_starts_an_empty_file(tmp_path):
    log_steps(tmp_path, 1, 3)
    with MetricsLog(tmp_path, 3, console=quiet()):
        assert read_metrics(tmp_path) == []


def test_a_broken_row_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n{"step": 3}\n')
    with pytest.raises(MeetjaxError, match=r"metrics\.jsonl:2: not a metrics row"), MetricsLog(tmp_path, 3, 1, console=quiet()):
        pass


def test_steps_go_up_only(tmp_path):
    with MetricsLog(tmp_path, 9, 4, console=quiet()) as log:
        with pytest.raises(MeetjaxError, match="expected more than 4"):
            log.write(4, {"loss": 0.0})
        log.write(5, {"loss": 0.0})
        with pytest.raises(MeetjaxError, match="expected more than 5"):
            log.write(5, {"loss": 0.0})


def test_tensorboard_has_every_value_and_hides_the_resumed_steps(tmp_path):
    log_steps(tmp_path, 1, 3)
    log_steps(tmp_path, 3, 4, start_step=2)
    events = read_events(tmp_path)
    values = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value if value.tag == "loss"]
    assert sorted((step, tag) for step, tag, _ in values) == [(step, "loss") for step in (1, 2, 3, 3, 4)]
    assert all(value == pytest.approx(1 / step) for step, _, value in values)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # made within one second, yet apart
    assert sorted(event.step for event in events if event.HasField("session_log")) == [1, 3]


def test_speed_leaves_out_the_first_step_and_untimed_ones(tmp_path):
    clock = Clock()
    with MetricsLog(tmp_path, 9, unit="examples", console=quiet(), clock=clock) as log:
        clock.now += 60  # compiles
        assert log.write(1, {}, examples=8, tokens=100) == {}
        clock.now += 2
        assert log.write(2, {}, examples=8, tokens=100) == {"examples_per_s": 4.0, "tokens_per_s": 50.0}
        clock.now += 30  # another shape compiles
        assert log.write(3, {}, examples=8, tokens=100, timed=False) == {"examples_per_s": 4.0, "tokens_per_s": 50.0}
        clock.now += 6
        assert log.write(4, {}, examples=8, tokens=300) == {"examples_per_s": 2.0, "tokens_per_s": 50.0}


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    with MetricsLog(tmp_path, 2, console=quiet()) as log:
        row = log.write(1, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 1e-3})
    assert math.isnan(row["loss"])
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "learning_rate": 1e-3}]


@pytest.mark.parametrize("value", [np.ones(3), "much", None])
def test_a_metric_is_one_number(tmp_path, value):
    with MetricsLog(tmp_path, 2, console=quiet()) as log, pytest.raises(MeetjaxError, match="metric loss; expected one number"):
        log.write(1, {"loss": value})


def test_plain_lines_come_at_most_every_ten_seconds(tmp_path):
    clock, console = Clock(), quiet()
    with MetricsLog(tmp_path, 20, console=console, clock=clock) as log:
        for step in range(1, 21):
            clock.now += 3
            log.write(step, {"loss": 0.5, "rewards/accuracies": 0.75}, examples=4, tokens=1200)
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"train step {step}/20" for step in (1, 5, 9, 13, 17, 20)]
    assert lines[0] == "train step 1/20  loss 0.5000  acc 0.75"
    assert lines[1] == "train step 5/20  loss 0.5000  acc 0.75  1.3 pairs/s  400 tok/s  eta 45 s"


def test_terminal_gets_a_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=140, legacy_windows=False)
    clock = Clock()
    with MetricsLog(tmp_path, 2, title="lora", console=console, clock=clock) as log:
        for step in (1, 2):
            clock.now += 4
            log.write(step, {"loss": 0.25}, examples=2, tokens=2000)
    shown = console.file.getvalue()
    assert "compiling" in shown
    last = shown.splitlines()[-1] if shown.splitlines()[-1].strip("\x1b[?25h") else shown.splitlines()[-2]
    for part in ("lora", "2/2", "loss 0.2500", "0.5 pairs/s", "500 tok/s", "eta 0 s"):
        assert part in last, part


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MeetjaxError, match="cannot write metrics"), MetricsLog(tmp_path / "file" / "run", 2, console=quiet()):
        pass


def test_a_full_disk_is_one_line_and_leaves_the_finished_rows(tmp_path, monkeypatch):
    with MetricsLog(tmp_path, 3, console=quiet()) as log:
        log.write(1, {"loss": 0.5})
        monkeypatch.setattr(log.events, "write_event", _no_space)
        with pytest.raises(MeetjaxError, match="cannot write metrics; found No space left"):
            log.write(2, {"loss": 0.5})
    assert read_metrics(tmp_path)[0] == {"step": 1, "loss": 0.5}


def test_the_error_inside_the_block_comes_out(tmp_path):
    with pytest.raises(KeyError, match="mine"), MetricsLog(tmp_path, 3, console=quiet()):
        raise KeyError("mine")


def test_peak_memory_is_in_gb_and_never_falls():
    before = peak_rss_gb()
    block = np.ones(64_000_000 // 8)
    after = peak_rss_gb()
    assert 0.02 < before <= after < 64
    assert block.nbytes == 64_000_000


def _no_space(*_):
    raise OSError(28, "No space left on device")
