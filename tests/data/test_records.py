"""Every layout of columns, every reason for leaving a row out, every error with its line."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from meetjax.data.records import Completion, Message, Pair, answers, parse_dialogue, read_records
from meetjax.errors import MeetjaxError

ASK = [{"role": "user", "content": "Where is the cat?"}]
MAT = [{"role": "assistant", "content": "On the mat."}]
BED = [{"role": "assistant", "content": "On the bed."}]
ASKED = (Message("user", "Where is the cat?"),)
HH = "\n\nHuman: Where is the cat?\n\nAssistant: Which one?\n\nHuman: The grey one.\n\nAssistant:"
HH_PROMPT = (Message("user", "Where is the cat?"), Message("assistant", "Which one?"), Message("user", "The grey one."))


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Where is the cat?", "chosen": "On the mat.", "rejected": "On the bed."}, "Where is the cat?"),
        ({"prompt": ASK, "chosen": MAT, "rejected": BED}, ASKED),
        ({"prompt": ASK, "chosen": "On the mat.", "rejected": "On the bed."}, ASKED),
        ({"prompt": "Where is the cat?", "chosen": MAT, "rejected": BED}, ASKED),
        ({"prompt": "Where is the cat?", "chosen": ASK + MAT, "rejected": ASK + BED}, ASKED),
        ({"prompt": ASK, "chosen": ASK + MAT, "rejected": ASK + BED}, ASKED),
        ({"chosen": ASK + MAT, "rejected": ASK + BED, "score": 3}, ASKED),
        ({"chosen": HH + " On the mat.", "rejected": HH + " On the bed.\n"}, HH_PROMPT),
    ],
)
def test_every_pair_layout_gives_the_same_answers_and_its_prompt(tmp_path, row, prompt):
    path = write(tmp_path / "pairs.jsonl", [row])
    records, audit = read_records(path, "pair")
    assert records == [Pair(prompt, "On the mat.", "On the bed.", f"{path}:1")]
    assert (audit.kept, audit.excluded) == (1, {})
    demonstrations, _ = read_records(path, "completion")
    assert demonstrations == [Completion(prompt, "On the mat.", f"{path}:1")]
    assert (answers(records[0]), answers(demonstrations[0])) == (("On the mat.", "On the bed."), ("On the mat.",))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "completion": MAT},
        {"prompt": ASK, "completion": "On the mat."},
        {"messages": ASK + MAT},
        {"messages": ASK + MAT + [{"role": "user", "content": "Thanks."}]},
    ],
)
def test_every_completion_layout(tmp_path, row):
    path = write(tmp_path / "sft.jsonl", [row])
    assert read_records(path, "completion")[0] == [Completion(ASKED, "On the mat.", f"{path}:1")]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json.gz", "json", "parquet"])
def test_every_file_ending_reads_the_same(tmp_path, ending):
    rows = [{"prompt": f"q{i}", "chosen": MAT, "rejected": BED} for i in range(5)]
    path = tmp_path / f"pairs.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(path, rows)
    records, _ = read_records(path, "pair")
    assert [(r.prompt[0].content, r.chosen, r.where) for r in records] == [(f"q{i}", "On the mat.", f"{path}:{i + 1}") for i in range(5)]
    assert len(read_records(path, "pair", limit=2)[0]) == 2


@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
def test_csv_and_names_of_its_columns(tmp_path, ending):
    """E2E's layout: two demonstrations of one meaning representation, quoted where there are commas and line breaks."""
    path = tmp_path / f"set.{ending}"
    text = '\ufeffmr,ref\r\n"name[A], near[B]","A is\nnear B, ""the pub""."\r\n\r\n"name[A], near[B]",Né\r\n'.encode()
    path.write_bytes(gzip.compress(text) if ending == "csv.gz" else text)
    records, _ = read_records(path, "completion", columns=("mr", "ref"))
    assert records == [
        Completion("name[A], near[B]", 'A is\nnear B, "the pub".', f"{path}:3"),
        Completion("name[A], near[B]", "Né", f"{path}:5"),
    ]
    with pytest.raises(MeetjaxError, match=r":3: missing column; expected text; found columns mr, ref"):
        read_records(path, "completion", columns=("mr", "text"))


def test_numbers_of_csv_are_text_and_mean_numbers(tmp_path):
    (tmp_path / "set.csv").write_text("prompt,completion,label,score\nq,a,1,0.5\nq,b,False,-2\nq,c,12,1e3\n")
    assert [r.label for r in read_records(tmp_path / "set.csv", "labelled")[0]] == [1, 0, 12]
    assert [r.score for r in read_records(tmp_path / "set.csv", "scored")[0]] == [0.5, -2.0, 1000.0]
    for text in ("", "good", "-1", "1.5", "2147483648"):
        (tmp_path / "bad.csv").write_text(f"prompt,completion,label\nq,a,{text}\n")
        with pytest.raises(MeetjaxError, match=r"bad\.csv:2: field 'label'; expected true, false or a class number from 0; found"):
            read_records(tmp_path / "bad.csv", "labelled")
    for text in ("", "good", "true", "nan", "inf"):
        (tmp_path / "bad.csv").write_text(f"prompt,completion,score\nq,a,{text}\n")
        with pytest.raises(MeetjaxError, match=r"bad\.csv:2: field 'score'; expected a finite number; found"):
            read_records(tmp_path / "bad.csv", "scored")


def test_line_numbers_count_blank_lines_and_only_newlines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False), "", json.dumps({"prompt": "d", "completion": "e"})]
    path.write_text("\n".join(rows), encoding="utf-8")
    records, _ = read_records(path, "completion")
    assert [(r.prompt, r.where) for r in records] == [("a\u2028b", f"{path}:1"), ("d", f"{path}:3")]


def test_dialogue_keeps_two_turns_of_one_role_apart():
    assert parse_dialogue("\n\nHuman: one\n\nmore\n\nAssistant: two\n\nAssistant: three\n\nHuman: Human: four") == (
        Message("user", "one\n\nmore"),
        Message("assistant", "two"),
        Message("assistant", "three"),
        Message("user", "Human: four"),
    )


def test_unusable_rows_are_counted_with_the_first_line(tmp_path):
    good = {"chosen": HH + " a", "rejected": HH + " b"}
    rows = [
        good,
        {"chosen": HH + " a", "rejected": "\n\nHuman: Other?\n\nAssistant: b"},
        {"chosen": HH + " a", "rejected": HH + "  a "},
        {"chosen": HH + " a\n\nHuman: b", "rejected": HH + " c"},
        {"chosen": HH + " a", "rejected": HH + " a"},
        {"chosen": HH + " ", "rejected": HH + " b"},
        {"chosen": MAT, "rejected": BED},
        {"prompt": [], "chosen": MAT, "rejected": BED},
        {"prompt": ASK, "chosen": MAT + ASK + MAT, "rejected": BED},
        {"prompt": "Something else?", "chosen": ASK + MAT, "rejected": ASK + BED},
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    records, audit = read_records(path, "pair")
    assert [r.where for r in records] == [f"{path}:1", f"{path}:6"] and audit.kept == 2
    assert {reason: (f.count, f.where.rsplit(":", 1)[1]) for reason, f in audit.excluded.items()} == {
        "the two sides do not share the prompt": (2, "2"),
        "chosen and rejected are identical": (2, "3"),
        "the answer is not one assistant turn": (2, "4"),
        "no message before the answer": (2, "7"),
    }
    assert {reason: (f.count, f.where) for reason, f in audit.noted.items()} == {"empty answer, left out when tokenised": (1, f"{path}:6")}
    demonstrations, _ = read_records(path, "completion")
    assert [r.where for r in demonstrations] == [r.where for r in records], "pairs and demonstrations of one file must split alike"


def test_messages_without_an_assistant_or_a_prompt_are_left_out(tmp_path):
    path = write(tmp_path / "sft.jsonl", [{"messages": ASK}, {"messages": MAT}, {"messages": ASK + MAT}])
    records, audit = read_records(path, "completion")
    assert [r.where for r in records] == [f"{path}:3"]
    assert set(audit.excluded) == {"the answer is not one assistant turn", "no message before the answer"}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": "q", "chosen": "a", "rejected": "a"}] * 3 + [{"prompt": "q", "chosen": "", "rejected": "a"}], "are identical"),
        ([{"prompt": "q", "chosen": "a", "rejected": " "}], "empty answer"),
    ],
)
def test_when_nothing_is_usable_the_top_reason_is_named(tmp_path, rows, reason):
    path = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(MeetjaxError, match=f"no row is usable.*{reason}.*pairs.jsonl:1"):
        read_records(path, "pair")


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        ('{"prompt": "q"', "pair", r"f.jsonl:1: broken JSON"),
        ('{"prompt": "q", "completion": "a"}\n{"prompt": ', "completion", r"f.jsonl:2: broken JSON"),
        ("[" * 100_000, "pair", r"f.jsonl:1: broken JSON"),
        ("[1]", "pair", r"f.jsonl:1: not a JSON object.*found list"),
        (b'{"prompt": "\xff"}', "pair", r"f.jsonl:1: not UTF-8"),
        ("", "pair", r"f.jsonl: no rows"),
        ('{"prompt": "q", "chosen": "a"}', "pair", r"f.jsonl:1: missing column; expected rejected; found columns chosen, prompt"),
        ('{"chosen": "a", "rejected": "b"}', "pair", r"f.jsonl:1: missing column; expected prompt"),
        ('{"text": "a"}', "completion", r"f.jsonl:1: missing column; expected prompt and completion.*found columns text"),
        ('{"completion": "a"}', "completion", r"f.jsonl:1: missing column; expected prompt"),
        ('{"prompt": "q", "completion": 3}', "completion", r"f.jsonl:1: field 'completion'; expected a string.*found int"),
        ('{"prompt": null, "completion": "a"}', "completion", r"f.jsonl:1: field 'prompt'.*found NoneType"),
        ('{"prompt": "q", "chosen": {"a": 1}, "rejected": "b"}', "pair", r"f.jsonl:1: field 'chosen'.*found dict"),
        ('{"messages": "hello"}', "completion", r"f.jsonl:1: field 'messages'.*found str"),
        ('{"messages": ["hello"]}', "completion", r"f.jsonl:1: field 'messages', message 0.*found str"),
        ('{"messages": [{"role": "user"}]}', "completion", r"f.jsonl:1: field 'messages', message 0.*found \['role'\]"),
        ('{"messages": [{"role": "asistant", "content": "a"}]}', "completion", r"message 0: role.*found 'asistant'"),
        ('{"messages": [{"role": "user", "content": 1}]}', "completion", r"message 0: content.*found int"),
    ],
)
def test_broken_input_is_named_by_file_and_line(tmp_path, content, form, message):
    (tmp_path / "f.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MeetjaxError, match=message) as caught:
        read_records(tmp_path / "f.jsonl", form)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for name, content, message in [
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "q", "completion": "a"}\n' * 99)[:-20], "cannot be read"),
        ("fake.jsonl.gz", b"not gzip", "cannot be read"),
        ("fake.parquet", b"not parquet", "cannot be read as Parquet"),
        ("fake.csv.gz", b"not gzip", "fake.csv.gz: cannot be read as CSV after line 0"),
        ("bytes.csv", b"prompt,completion\nq,\xff", "bytes.csv: cannot be read as CSV after line 0"),
        ("quote.csv", b'prompt,completion\nq,a\nq,"a', "quote.csv: cannot be read as CSV after line 2"),
        ("short.csv", b"prompt,completion\nq,a\nq", "short.csv:3: broken row; expected 2 fields, as many as the first line; found fewer"),
        ("long.csv", b"prompt,completion\nq,a,b", "long.csv:2: broken row.*found more"),
        ("column.csv", b"mr,ref\nq,a", "column.csv:2: missing column; expected prompt and completion.*found columns mr, ref"),
        ("empty.csv", b"", "no rows"),
        ("rows.tsv", b"a,b", "file name.*expected an ending"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MeetjaxError, match=message):
            read_records(tmp_path / name, "completion")
    with pytest.raises(MeetjaxError, match="no such file"):
        read_records(tmp_path / "none.jsonl", "pair")
    with pytest.raises(MeetjaxError, match="no such file"):
        read_records("data/none.jsonl", "pair")
    with pytest.raises(MeetjaxError, match="not a file"):
        read_records(tmp_path, "pair")


def test_bad_arguments(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(MeetjaxError, match="data form; expected pair or completion or labelled or scored or edited; found 'pairs'"):
        read_records(path, "pairs")
    with pytest.raises(MeetjaxError, match="limit"):
        read_records(path, "completion", limit=0)
    with pytest.raises(MeetjaxError, match=r"split.*give no split \(data.split=none\)"):
        read_records(path, "completion", split="train")


def test_hub_sets(monkeypatch):
    train = datasets.Dataset.from_list([{"prompt": ASK, "completion": MAT}, {"prompt": "q", "completion": "a"}][:1])
    asked = []

    def load(name, data_dir, split):
        asked.append((name, data_dir, split))
        if name == "org/missing":
            raise datasets.exceptions.DatasetNotFoundError("no such set")
        both = datasets.DatasetDict({"train": train, "test": train} if name == "org/two" else {"train": train})
        return both if split is None else both[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_records("org/two", "completion", split="test")[0] == [Completion(ASKED, "On the mat.", "org/two[test]:1")]
    assert read_records("org/one:some-folder", "completion")[0][0].where == "org/one:some-folder[train]:1"
    assert asked == [("org/two", None, "test"), ("org/one", "some-folder", None)]
    with pytest.raises(MeetjaxError, match="org/two: split; expected one of test, train"):
        read_records("org/two", "completion")
    with pytest.raises(MeetjaxError, match=r"org/missing\[train\]: cannot be loaded from the hub.*no such set"):
        read_records("org/missing", "completion", split="train")
