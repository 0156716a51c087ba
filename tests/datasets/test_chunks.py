"""Documents of running text: split at headings and paragraphs, none too long, no text lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from components.datasets.chunks import MAX_CHARS, read_markdown, read_text, target_chars


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def texts(path: Path) -> list[str]:
    return [record.values["text"] for record in read_text(path, target_chars([path]))]


def encyclopedia(articles: int, paragraphs: int = 12) -> str:
    random_ = random.Random(1)
    parts = []
    for article in range(articles):
        parts.append(f" \n = Article {article} = \n \n")
        for number in range(paragraphs):
            if number % 4 == 2:
                parts.append(f" = = Section {number} = = \n \n")
            parts.append(" " + " ".join(f"w{random_.randrange(999)}" for _ in range(150)) + " \n \n")
    return "".join(parts)


def test_headings_of_an_encyclopedia_start_documents(tmp_path: Path) -> None:
    cut = texts(written(tmp_path / "wiki.txt", encyclopedia(30)))
    starts = [text for text in cut if text.startswith("= Article ")]
    assert len(starts) == 30
    assert all(text.count("= Article ") <= 1 for text in cut)
    assert max(map(len, cut)) <= MAX_CHARS


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n \t\n"])
def test_paragraphs_are_kept_whole(tmp_path: Path, separator: str) -> None:
    paragraphs = [f"Paragraph {number}: " + "some words " * 40 for number in range(300)]
    cut = texts(written(tmp_path / "book.txt", separator.join(paragraphs)))
    assert len(cut) > 40
    assert all(text.startswith("Paragraph ") for text in cut)
    assert sum(text.count("Paragraph ") for text in cut) == 300


def test_nothing_but_white_space_is_lost(tmp_path: Path) -> None:
    text = encyclopedia(10) + "x" * 30_000 + "\n" + "one more line\n" * 2000
    assert "".join("".join(texts(written(tmp_path / "a.txt", text))).split()) == "".join(text.split())


def test_short_text_is_cut_finely_enough_to_hold_some_out(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "\n\n".join(f"Paragraph {number}." for number in range(20)))
    assert len(texts(path)) == 20


def test_lines_without_a_blank_one_are_split_at_line_ends(tmp_path: Path) -> None:
    lines = [f"Sentence {number} of a file with one sentence per line.\n" for number in range(1000)]
    cut = texts(written(tmp_path / "a.txt", "".join(lines)))
    assert len(cut) > 20
    assert all(text.startswith("Sentence") and text.endswith("line.") for text in cut)


def test_very_long_line_is_cut_between_words(tmp_path: Path) -> None:
    cut = texts(written(tmp_path / "a.txt", "word " * 20_000))
    assert max(map(len, cut)) <= MAX_CHARS
    assert {word for text in cut for word in text.split()} == {"word"}


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert texts(written(tmp_path / "a.txt", "\ufeffhello\n")) == ["hello"]


def test_text_of_white_space_holds_no_document(tmp_path: Path) -> None:
    assert texts(written(tmp_path / "a.txt", " \n\n\t\n")) == []


def test_documents_know_the_line_they_start_on(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "\nfirst\n\nsecond\n\n\nthird\n")
    assert [record.location for record in read_text(path, 1)] == ["a.txt:2", "a.txt:4", "a.txt:7"]


def test_several_small_files_are_taken_together(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{number}.txt", "A line.\n\n" * 100) for number in range(70)]
    assert all(len(list(read_text(file, target_chars(files)))) <= 2 for file in files)


def test_markdown_file_is_one_document(tmp_path: Path) -> None:
    text = "# Title\n\nWords.\n\n## Part\n\nMore words.\n\n# Second\n\nEnd."
    assert [record.values["text"] for record in read_markdown(written(tmp_path / "a.md", text))] == [text]


def test_long_markdown_is_cut_at_headings_but_not_within_code(tmp_path: Path) -> None:
    section = "# Part {}\n\n" + "Some words here. " * 60 + "\n\n```sh\n# a comment\n\n\n# another\n```\n\n"
    cut = [
        record.values["text"]
        for record in read_markdown(written(tmp_path / "a.md", "".join(section.format(n) for n in range(20))))
    ]
    assert len(cut) == 20
    assert all(text.startswith("# Part") and text.endswith("```") for text in cut)
