"""Which files hold a split, and what happens to files that are packed, damaged or odd."""

import gzip
import json
from pathlib import Path

import pytest

from ludic.task.datafiles import read_rows, split_files

ROW = {"question": "How many?", "answer": "#### 18"}
LINE = json.dumps(ROW).encode() + b"\n"


def lay(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("there", "read"),
    [
        (["train.jsonl", "train.jsonl.gz", "test.jsonl"], ["train.jsonl"]),
        (["train.jsonl.gz", "train.parquet"], ["train.jsonl.gz"]),
        (["train.jsonl", "old/train.jsonl", "main/train.jsonl"], ["train.jsonl"]),
        (["train.csv", "main/train.jsonl"], ["train.csv"]),
        (["main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet", "socratic/train-00000-of-00001.parquet"],
         ["main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet"]),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], ["data/train-00000-of-00001.parquet"]),
        (["train.0.csv.gz", "train.1.csv.gz"], ["train.0.csv.gz", "train.1.csv.gz"]),
        (["train.jsonl", ".ipynb_checkpoints/train.jsonl", "training_args.jsonl", "train_old.jsonl", "train.jsonl.bak"],
         ["train.jsonl"]),
        (["a/.hidden/train.csv", "b/train.csv"], ["b/train.csv"]),
    ],
)  # fmt: skip
def test_a_split_is_read_once_from_the_files_that_hold_it(tmp_path: Path, there: list[str], read: list[str]) -> None:
    folder = tmp_path / ".cache" / "gsm8k"  # a hidden folder above is the user's own choice
    lay(folder, *there)
    assert [str(file.relative_to(folder)) for file in split_files("train", folder)] == read


@pytest.mark.parametrize("there", [[], ["train.txt"], ["test.jsonl"], [".git/train.jsonl"], ["training_args.parquet"]])
def test_a_folder_without_the_split_is_said(tmp_path: Path, there: list[str]) -> None:
    lay(tmp_path, *there)
    with pytest.raises(
        ValueError, match=r"holds no train\.jsonl \(nor train\.jsonl\.gz, train\*\.parquet or train\*\.csv\)$"
    ):
        split_files("train", tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.json", "a[1]*?.csv", "p.csv.gz", "p.parquet", "p"])
def test_a_file_is_read_by_its_name_and_unpacked_by_its_content(tmp_path: Path, name: str, packed: bool) -> None:
    path = tmp_path / name
    if "csv" in name:
        path.write_bytes(b"\xef\xbb\xbfquestion,answer\r\nHow many?,#### 18\r\n")
    elif "parquet" in name:
        from datasets import Dataset  # not in the environment of the tests marked `vllm`, which collect this file too

        Dataset.from_list([ROW]).to_parquet(path)
    else:
        path.write_bytes(LINE)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    place = f"{path}:1"
    assert list(read_rows([path, path])) == [(place, ROW), (place, ROW)]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.jsonl.gz", gzip.compress(LINE * 1_000, mtime=0)[:-20], r"p\.jsonl\.gz: not a gzip file that can be read \(.+\)"),
        ("p.jsonl.gz", gzip.compress(LINE, mtime=0)[:-8] + b"12345678", r"p\.jsonl\.gz: not a gzip file .*CRC.*"),
        ("p.csv.gz", b"\x1f\x8b\x08 and no more", r"p\.csv\.gz: not a gzip file that can be read \(.+\)"),
        ("p.jsonl", LINE + b'{"id": ' + b"9" * 5_000 + b"}", r"p\.jsonl:2: not a row \(a number of more than 4300 digits\)"),
        ("p.jsonl", b"9" * 5_000, r"p\.jsonl:1: not a row \(a number of more than 4300 digits\)"),
        ("p.csv", b'a,b\n1,2\n"3,4\n', r"p\.csv: not a csv file that can be read \(unexpected end of data, after 1 rows\)"),
        ("p.csv", b"a,b\n1,2,3\n", r"p\.csv: not a csv file .* \(more fields than the first line names, after 1 rows\)"),
        ("p.csv", b"a,b\n\xff,2\n", r"p\.csv: not a csv file .*can't decode byte 0xff.*"),
        ("p.parquet", b"PAR1", r"p\.parquet: not a parquet file that can be read \(Parquet file size is 4 bytes.*\)"),
        ("p.parquet", LINE * 10, r"p\.parquet: not a parquet file that can be read \(Parquet magic bytes not found.*\)"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line_with_its_name_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^.*{reason}$") as caught:
        list(read_rows([tmp_path / name]))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
