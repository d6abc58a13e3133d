"""Rows and text of the user's own files: what is read, how it is split, and what is refused in words."""

import json
import logging

import pytest

from apt_ext.tools.data import Missing
from apt_ext.tools.own_data import is_text, load_task, texts

HEADER = "text,label\n"


def rows(number=40, classes=2):
    return "".join(f"film {i},{'abcdefgh'[i % classes]}\n" for i in range(number))


@pytest.fixture
def write(tmp_path):
    def put(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [str(path)]

    return put


def task(data, validation=None, **more):
    return load_task(data, validation, **{"text": "text", "label": "label", **more})


def lines(number, key="label"):
    return "".join(json.dumps({"text": f"film {i}", key: i % 2}) + "\n" for i in range(number))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", HEADER + rows()),
        ("a.tsv", (HEADER + rows()).replace(",", "\t")),
        ("a.csv", (HEADER + rows()).replace(",", ";")),
        ("a.csv", b"\xef\xbb\xbf" + (HEADER + rows()).replace("\n", "\r\n").encode()),
        ("a.jsonl", "".join(json.dumps({"text": f"film {i}", "label": "ab"[i % 2], "more": [1]}) + "\n\n" for i in range(40))),
        ("a.json", json.dumps([{"text": f"film {i}", "label": "ab"[i % 2]} for i in range(40)])),
    ],
    ids=["csv", "tsv", "semicolons", "bom", "jsonl", "json"],
)
def test_the_same_rows_in_every_format(write, name, content):
    found = task(write(name, content))
    assert found.labels == ["a", "b"] and len(found.train) == 36 and len(found.validation) == 4
    assert sorted(row.label for row in found.validation) == ["a", "a", "b", "b"]
    assert {row.text for row in found.train + found.validation} == {f"film {i}" for i in range(40)}
    assert found.fingerprint() == task(write("other.csv", HEADER + rows())).fingerprint()
    assert found.fingerprint() != task(write("other.csv", HEADER + rows()), seed=1).fingerprint()


def test_every_class_is_in_both_parts_and_a_split_is_the_same_again(write):
    data = write("a.csv", HEADER + rows(100) + "rare 1,z\nrare 2,z\n")
    found = task(data, share=0.1)
    assert {row.label for row in found.train} == {row.label for row in found.validation} == {"a", "b", "z"}
    assert found == task(data, share=0.1) != task(data, share=0.1, seed=1)


def test_a_class_of_one_row_is_trained_on_and_said(write, caplog):
    found = task(write("a.csv", HEADER + rows() + "rare,z\n"))
    assert "z" in {row.label for row in found.train} and "z" not in {row.label for row in found.validation}
    assert "1 classes have one row, which is trained on and not evaluated: 'z'" in caplog.text


def test_whole_numbers_are_classes_in_order_and_others_a_regression(write, caplog):
    numbers = write("a.csv", HEADER + "".join(f"film {i},{i % 11}\n" for i in range(60)))
    assert task(numbers).labels == [str(i) for i in range(11)]
    halves = write("b.csv", HEADER + "".join(f"film {i},{i % 5 / 2}\n" for i in range(60)))
    assert not caplog.text
    found = task(halves)
    assert found.regression and {found.number(row) for row in found.train} == {0.0, 0.5, 1.0, 1.5, 2.0}
    assert "numbers that are not whole: a regression (--problem classification says otherwise)" in caplog.text
    assert task(numbers, problem="regression").regression and not task(halves, problem="classification").regression


def test_the_order_of_the_models_classes_stays(write):
    data = write("a.csv", HEADER + rows())
    assert task(data, known=["b", "a"]).labels == ["b", "a"] and task(data, known=["c", "a"]).labels == ["a", "b"]


def test_pairs_and_files_to_evaluate_on(write, caplog):
    data = write("a.csv", "one,two,label\n" + "".join(f"a {i},b {i},{i % 2}\n" for i in range(20)))
    held = write("b.csv", "one,two,label\na 0,b 0,1\nc,d,0\n")
    found = task(data, held, text="one", pair="two")
    assert len(found.train) == 20 and [row.pair for row in found.validation] == ["b 0", "d"]
    assert "1 texts are in both" in caplog.text


def test_few_rows_without_a_text_or_label_are_left_out_and_said(write, caplog):
    found = task(write("a.csv", HEADER + rows() + "x,\n , a\ny,NaN\n"))
    assert len(found.train) + len(found.validation) == 40
    assert "1 rows without a text are left out (a.csv:43)" in caplog.text
    assert "2 rows without a label are left out (a.csv:42; a.csv:44)" in caplog.text


def test_classes_that_differ_in_capitals_are_said(write, caplog):
    task(write("a.csv", HEADER + rows() + "x,A\ny,A\n"))
    assert "only in capitals are different classes: a and A" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "expected rows in .*a.csv, got an empty file"),
        ("a.csv", HEADER, "expected rows below the header, got none"),
        ("a.csv", "txt,lable\n" + rows(), "a column 'text' in .*, got the columns 'txt', 'lable'; nearest: txt"),
        ("a.csv", "text,label,text\nx,1,y\n", "expected one column 'text' in .*, got 2"),
        ("a.csv", HEADER + rows() + "a, b, c\n", "expected the 2 columns of the header in line 42 of .*, got 3; a text that holds ','"),
        ("a.csv", HEADER + "".join(f"film {i},a\n" for i in range(40)), "at least 2 classes in 'label', got 'a' in every row"),
        ("a.csv", HEADER + "".join(f"film {i},id{i}\n" for i in range(99)), "got 99 different values in 99 rows, which look like names"),
        ("a.csv", HEADER + "".join(f"film {i},{'a' if i % 2 else ''}\n" for i in range(40)), "got 20 of 40 without in 'label'"),
        ("a.csv", HEADER + rows() + '"open,a\n', "expected a table, got line 42 of .*; is a quotation mark open"),
        ("a.csv", HEADER + rows(6), "expected at least 8 rows to train on, got 4"),
        ("a.csv", (HEADER + rows() + "caf\xe9,a\n").encode("latin-1"), "got byte 0xe9 in line 42 of .*--encoding cp1252"),
        ("a.csv", (HEADER + rows()).encode("utf-16"), "got byte 0xff in line 1 of .*--encoding utf-16"),
        ("a.csv", (HEADER + rows()).encode("utf-16-le"), "got zero bytes in .*--encoding utf-16"),
        ("a.jsonl", lines(20) + "{", "expected JSON, got line 21 of"),
        ("a.jsonl", "[1]\n", "expected an object with columns in row 1 of"),
        ("a.jsonl", '{"text": ["x"], "label": 1}\n', "expected a text or a number as 'text' in row 1 of"),
        ("a.jsonl", lines(20) + lines(1, "lable"), "expected a column 'label' in .*, got the columns 'text', 'lable'; nearest: lable"),
        ("a.json", "[1", "expected JSON, got .*a.json"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(write, name, content, words):
    with pytest.raises(Missing, match=words):
        task(write(name, content))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"encoding": "foo"}, "encoding: expected one that Python knows .*, got 'foo'"),
        ({"problem": "regression"}, "expected finite numbers in 'label' for a regression, got 'a'"),
        ({"pair": "othr"}, "a column 'othr'"),
    ],
)
def test_what_does_not_fit_the_table_is_said(write, more, words):
    with pytest.raises(Missing, match=words):
        task(write("a.csv", HEADER + rows()), **more)


def test_labels_that_only_the_evaluated_files_have_are_refused(write):
    with pytest.raises(Missing, match="expected the labels of --data .'a', 'b'., got 'z'"):
        task(write("a.csv", HEADER + rows()), write("b.csv", HEADER + "x,z\n"))


def test_another_encoding_is_read(write):
    data = write("a.csv", (HEADER + rows() + "caf\xe9,a\ncaf\xe9s,b\n").encode("latin-1"))
    found = task(data, encoding="cp1252")
    assert any("caf\xe9" in row.text for row in found.train + found.validation)


def test_a_quotation_mark_in_a_tsv_is_a_character(write):
    found = task(write("a.tsv", (HEADER + rows() + '"open,a\n').replace(",", "\t")))
    assert any(row.text == '"open' for row in found.train + found.validation)


# -- text --------------------------------------------------------------------------------------------------------------


def test_texts_of_files_and_directories(tmp_path, caplog):
    (tmp_path / "deep").mkdir()
    for name, text in (("b.txt", "two"), ("a.txt", "one"), ("deep/c.md", "three"), ("empty.txt", " "), ("no.bin", "x")):
        (tmp_path / name).write_text(text)
    assert is_text([str(tmp_path)])
    assert list(texts([str(tmp_path)], "utf-8").values()) == ["one", "two", "three"]
    assert "1 empty files are left out" in caplog.text and caplog.records[0].levelno == logging.WARNING


def test_what_is_no_data_is_said(tmp_path, write):
    table, text, other = write("a.csv", HEADER), write("a.txt", "x"), write("a.xlsx", "PK")
    assert not is_text(table) and is_text(text)
    for given, words in (
        ([str(tmp_path / "no.csv")], "found none at .*no.csv"),
        (other, "expected .csv, .tsv, .jsonl, .json, or .txt for a language model, got"),
        (table + text, "expected tables or plain text, got both"),
    ):
        with pytest.raises(Missing, match=words):
            is_text(given)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(Missing, match="expected .txt files in .*nothing, found none"):
        texts([str(tmp_path / "nothing")], "utf-8")
    with pytest.raises(Missing, match="expected text, got 1 empty files"):
        texts(write("e.txt", " \n"), "utf-8")
