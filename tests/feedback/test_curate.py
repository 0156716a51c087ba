"""What people said becomes rows to learn from, and no prompt is on both sides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.params import InputError
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter, Row, read_rows
from components.feedback.curate import TrainingExample, curate, hold_out, training_example_of, with_their_pictures
from components.feedback.items import NO_CALL, Reworded, prompt_key, read_items, skill_of
from components.media.messages import IMAGE
from components.media.pictures import Picture
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from examples.stdlib_agent.dialogue import Hop, exchange
from tests.feedback.project import chat, correction, item, lookup, new_run, write_partition, write_project


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return write_project(tmp_path)


def curated(paths: Paths) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((paths.curated / "curated.json").read_text())
    return read


def rows(paths: Paths, name: str, split: str) -> dict[str, Row]:
    return {row["id"]: row for row in read_rows(paths.curated / name, split)}


def both_sides(paths: Paths, name: str) -> dict[str, Row]:
    return rows(paths, name, "train") | rows(paths, name, "test")


def words(messages: list[Row] | None) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages or []]


def learned(paths: Paths, name: str) -> list[tuple[str, str]]:
    """Each packed conversation of a folder of token rows: all of it, and what of it is learned."""
    folder = paths.curated / name
    tokenizer = load_chat_tokenizer(paths.start)
    facts = json.loads((folder / "rows.json").read_text())
    shape = (facts["rows"]["train"], facts["seq_len"])
    kinds = {"ids": facts["dtype"], "segments": "uint16", "mask": "uint8"}
    arrays = (np.fromfile(folder / f"train.{part}.bin", kind).reshape(shape) for part, kind in kinds.items())
    found = []
    for ids, segments, mask in zip(*arrays, strict=True):
        for number in range(1, segments.max() + 1):
            here = segments == number
            found.append((tokenizer.decode(ids[here].tolist()), tokenizer.decode(ids[here & (mask != 0)].tolist())))
    return found


def test_prompts_are_held_out_and_never_rows(paths: Paths) -> None:
    first = [correction(number) for number in range(40)]
    again = [item(100 + number, f" Where is  NAME_{number} ", "lookup", rating="up") for number in range(40)]
    write_partition(paths, first)
    write_partition(paths, again)
    curate(new_run(paths, "curate"))
    test = rows(paths, "demonstrations", "test")
    assert len(test) == curated(paths)["skills"]["lookup"]["held_out"] == 10
    assert {row["suite"] for row in test.values()} == {"feedback/lookup"}
    assert {row["suite"] for row in rows(paths, "demonstrations", "train").values()} == {None}
    numbers = {int(name.removeprefix("fb-")) for name in test}
    # The second vote on a held-out prompt is held out too, and a correction's own preference is not asked again.
    assert set(rows(paths, "preferences", "test")) == {f"fb-{100 + number}" for number in numbers}
    trained = {number % 100 for number in map(int, (name.removeprefix("fb-") for name in curated(paths)["feedback"]))}
    assert trained == set(range(40)) - numbers
    asked = {words(row["messages"])[0][1] for row in test.values()}
    for name in ("sft", "preferences-rows"):
        for said, _ in learned(paths, name):
            assert not any(question in said.lower() for question in asked)


def test_more_feedback_moves_no_prompt_to_the_other_side() -> None:
    lessons = [TrainingExample(str(number), f"key {number}", "abc"[number % 3], None, None) for number in range(90)]
    everything = hold_out(lessons, 0.25, seed=3)
    assert everything != hold_out(lessons, 0.25, seed=4)
    for count in range(1, 91):
        first = lessons[:count]
        assert hold_out(first, 0.25, seed=3) == everything & {lesson.key for lesson in first}


def test_a_withdrawn_item_moves_no_other_prompt(paths: Paths) -> None:
    write_partition(paths, [correction(number) for number in range(16)])
    curate(new_run(paths, "curate"))
    before = set(rows(paths, "demonstrations", "test"))
    gone = min(set(curated(paths)["feedback"]))
    (paths.feedback / "withdrawn.json").write_text(json.dumps({gone: "revoked"}))
    curate(new_run(paths, "curate"))
    assert set(rows(paths, "demonstrations", "test")) == before


def pictured(number: int, question: str, pictures: list[Picture], **changes: Any) -> Row:
    """An item whose question is about pictures, one mark for each."""
    marks = IMAGE * len(pictures)
    return item(number, f"{marks}{question}", images=[each.digest for each in pictures], **changes)


def test_items_with_pictures_are_set_aside_and_come_with_them(paths: Paths) -> None:
    pictures = [Picture(np.full((4, 6, 3), shade, np.uint8)) for shade in (0, 100, 200)]
    seen = [
        pictured(50, "what?", pictures[:2], correction="two shades"),
        pictured(51, "what?", pictures[2:], rating="up"),
    ]
    write_partition(paths, [*(correction(number) for number in range(8)), *seen])
    table = pa.table({"digest": [each.digest for each in pictures], "content": [each.png() for each in pictures]})
    pq.write_table(table, paths.feedback / "pictures-000000000-000000051.parquet")
    curate(new_run(paths, "curate"))
    report = curated(paths)
    assert list(report["set_aside"].values()) == [["fb-50", "fb-51"]]
    assert json.loads((paths.metrics / "curate.json").read_text())["set_aside"] == 2
    assert not set(report["feedback"]) & {"fb-50", "fb-51"}
    assert not {"fb-50", "fb-51"} & set(both_sides(paths, "demonstrations") | both_sides(paths, "preferences"))
    examples = [training_example_of(each) for each in read_items(paths.feedback) if each.images]
    first, second = with_their_pictures(paths.feedback, examples)
    shrunk, _ = with_their_pictures(paths.feedback, examples, 2)
    assert shrunk.demonstration is not None
    assert [each.pixels.shape for each in shrunk.demonstration["messages"][0]["images"]] == [(2, 2, 3)] * 2
    assert first.key != second.key
    assert first.demonstration is not None
    assert first.preference is not None
    assert second.preference is not None
    prompts = (first.demonstration["messages"][0], first.preference["prompt"][0], second.preference["prompt"][0])
    shown = [[int(each.pixels[0, 0, 0]) for each in message["images"]] for message in prompts]
    assert shown == [[0, 100], [0, 100], [200]]
    assert [message["content"] for message in second.preference["chosen"]] == ["no idea"]


def test_feedback_on_pictures_alone_trains_nothing_yet(paths: Paths) -> None:
    picture = Picture(np.zeros((2, 2, 3), np.uint8))
    write_partition(paths, [pictured(1, "what?", [picture], correction="black")])
    with pytest.raises(InputError, match="all 1 items have pictures"):
        curate(new_run(paths, "curate"))


def test_a_correction_is_a_demonstration_and_a_pair(paths: Paths) -> None:
    same = item(9, "where is name_9?", "lookup", rating="up", correction="no idea")
    write_partition(paths, [*(correction(number) for number in range(4)), same])
    curate(new_run(paths, "curate"))
    demonstrations, preferences = both_sides(paths, "demonstrations"), both_sides(paths, "preferences")
    assert set(demonstrations) == {"fb-0", "fb-1", "fb-2", "fb-3", "fb-9"}
    train = set(rows(paths, "demonstrations", "train"))
    assert set(preferences) == train - {"fb-9"}, "a correction to the very same words prefers nothing"
    assert set(curated(paths)["feedback"]) == train
    for name, row in preferences.items():
        number = name.removeprefix("fb-")
        assert words(row["prompt"]) == [
            ("user", f"where is name_{number}?"),
            ("assistant", ""),
            ("tool", f"module_{number}"),
        ]
        assert words(row["chosen"]) == [("assistant", f"in module_{number}")]
        assert words(row["rejected"]) == [("assistant", "no idea")]
        assert words(demonstrations[name]["messages"]) == words(row["prompt"]) + words(row["chosen"])
    assert curated(paths)["skills"]["lookup"]["corrections"] == 4


def test_a_thumb_alone_is_a_vote_on_all_that_the_model_did(paths: Paths) -> None:
    liked = item(1, "where is name_1?", "lookup", rating="up")
    write_partition(paths, [liked, item(2, "hello number 2")])
    curate(new_run(paths, "curate"))
    votes = both_sides(paths, "preferences")
    assert both_sides(paths, "demonstrations") == {}
    assert words(votes["fb-1"]["prompt"]) == [("user", "where is name_1?")]
    assert [role for role, _ in words(votes["fb-1"]["chosen"])] == ["assistant", "tool", "assistant"]
    assert votes["fb-1"]["rejected"] is None
    assert votes["fb-2"]["chosen"] is None
    assert words(votes["fb-2"]["rejected"]) == [("assistant", "no idea")]
    assert curated(paths)["skills"]["lookup"] | {"overruled": False} == {
        "corrections": 0,
        "held_out": 0,
        "votes": 1,
        "overruled": False,
    }


def test_what_was_withdrawn_is_nowhere(paths: Paths) -> None:
    write_partition(paths, [correction(number) for number in range(12)])
    gone = {"fb-3": "revoked", "fb-7": "replaced"}
    (paths.feedback / "withdrawn.json").write_text(json.dumps(gone))
    curate(new_run(paths, "curate"))
    found = {*both_sides(paths, "demonstrations"), *both_sides(paths, "preferences"), *curated(paths)["feedback"]}
    assert found == {f"fb-{number}" for number in range(12)} - set(gone)
    for name in ("sft", "preferences-rows"):
        for said, _ in learned(paths, name):
            assert "name_3?" not in said
            assert "name_7?" not in said
    assert curated(paths)["skills"]["lookup"]["corrections"] == 10


@pytest.mark.parametrize(("corrections", "overruled"), [(7, False), (8, True)])
def test_enough_corrections_overrule_the_wording_of_their_skill(
    corrections: int, overruled: bool, paths: Paths
) -> None:
    write_partition(paths, [correction(number) for number in range(corrections)])
    curate(new_run(paths, "curate"))
    assert curated(paths)["skills"]["lookup"]["overruled"] is overruled
    replay = learned(paths, "replay")
    assert len(replay) == 20
    calls = [mask for said, mask in replay if "where is" in said]
    assert calls
    for mask in calls:
        assert "lookup" in mask, "the call is learned again in either case"
        assert (" is in module_" in mask) is not overruled
    # Other skills keep their words.
    assert all("hello, you are" in mask for said, mask in replay if "hello number" in said)


def test_only_the_last_turn_of_a_demonstration_is_learned(paths: Paths) -> None:
    write_partition(paths, [correction(number) for number in range(8)])
    curate(new_run(paths, "curate"))
    told = learned(paths, "sft")
    assert {mask for _, mask in told} == {
        f" in module_{name.removeprefix('fb-')}" for name in rows(paths, "demonstrations", "train")
    }
    assert all("lookup" in said for said, _ in told), "the call is there to be read"


def tokens(paths: Paths, name: str) -> int:
    return int((np.fromfile(paths.curated / name / "train.segments.bin", "uint16") != 0).sum())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_demonstrations_have_their_share_of_the_tokens(share: float, paths: Paths) -> None:
    write_partition(paths, [correction(number) for number in range(4)])
    curate(new_run(paths, "curate", curate__feedback_share=share))
    told, replayed = tokens(paths, "sft"), tokens(paths, "replay")
    times = len(learned(paths, "sft")) / 3
    assert times == int(times)
    assert abs(told - share / (1 - share) * replayed) <= told / times / 2, "one time more or less is further off"


@pytest.mark.parametrize(("share", "corrections", "times"), [(0.9, 1, 40), (0.01, 20, 1)])
def test_a_demonstration_is_told_once_at_least_and_forty_times_at_most(
    share: float, corrections: int, times: int, paths: Paths
) -> None:
    write_partition(paths, [correction(number) for number in range(corrections)])
    curate(new_run(paths, "curate", curate__feedback_share=share))
    trained = len(rows(paths, "demonstrations", "train"))
    assert trained > 0
    assert len(learned(paths, "sft")) == times * trained


def test_a_demonstration_is_told_as_it_is_first_and_with_noise_then(paths: Paths) -> None:
    write_partition(paths, [correction(number) for number in range(4)])
    plain = {}
    for noise in (0.0, 1.0):
        curate(new_run(paths, "curate", curate__feedback_share=0.6, curate__noise=noise))
        plain[noise] = Counter(said for said, _ in learned(paths, "sft"))
    assert len(plain[0.0]) == 3
    for said, times in plain[0.0].items():
        assert 1 <= plain[1.0][said] < times / 2


def test_nothing_to_learn_is_an_input_error(paths: Paths) -> None:
    with pytest.raises(InputError, match="no training examples"):
        curate(new_run(paths, "curate"))
    write_partition(paths, [correction(0)])
    (paths.feedback / "withdrawn.json").write_text(json.dumps({"fb-0": "revoked"}))
    with pytest.raises(InputError, match=r"feedback: no training examples; collect feedback and run"):
        curate(new_run(paths, "curate"))


def test_a_preference_set_of_the_user_s_own_is_learned_beside_feedback(paths: Paths) -> None:
    with DatasetWriter(paths.added / "mine", "mine", "preferences") as writer:
        for number in range(8):
            (prompt, chosen), rejected = chat(number), {"role": "assistant", "content": "go away"}
            writer.write("train", {"id": f"m{number}", "prompt": [prompt], "chosen": [chosen], "rejected": [rejected]})
    write_partition(paths, [correction(number) for number in range(4)])
    curate(new_run(paths, "curate", align__dataset=["feedback", "mine"]))
    facts = curated(paths)
    assert facts["skills"]["mine"] == {"corrections": 0, "held_out": 0, "votes": 8, "overruled": False}
    assert {name for name in facts["feedback"] if name.startswith("m")} < {f"m{number}" for number in range(8)}
    assert len([name for name in rows(paths, "preferences", "test") if name.startswith("m")]) == 2
    assert facts["rows"]["pairs"] == 6 + len(rows(paths, "demonstrations", "train"))
    curate(new_run(paths, "curate", align__dataset="mine"))
    assert set(curated(paths)["skills"]) == {"mine"}


def test_align_learns_from_no_other_kind_of_dataset(paths: Paths) -> None:
    with DatasetWriter(paths.added / "talk", "talk", "conversations") as writer:
        writer.write("train", {"id": "1", "messages": chat(1)})
    with pytest.raises(InputError, match=r"align\.dataset: 'talk' holds conversations; align learns from preferences"):
        curate(new_run(paths, "curate", align__dataset="talk"))


def test_items_come_back_in_the_order_in_which_people_spoke(paths: Paths) -> None:
    write_partition(paths, [correction(number) for number in range(100, 103)])
    write_partition(paths, [correction(number) for number in range(3)])
    assert [one.sequence for one in read_items(paths.feedback)] == [0, 1, 2, 100, 101, 102]


def test_a_skill_is_the_last_call_behind_the_last_question() -> None:
    assert skill_of(lookup(1)) == "lookup"
    assert skill_of([*lookup(1), *chat(2)]) == NO_CALL
    chained = exchange("Where is the base of X?", [Hop("bases", "X", "Y"), Hop("module", "Y", "z")])
    assert skill_of([*lookup(1), *chained]) == "module"
    assert skill_of([]) == NO_CALL


def test_one_prompt_in_other_spelling_has_one_key() -> None:
    def key(text: str, role: str = "user") -> str:
        return prompt_key([{"role": role, "content": text}])

    assert key("Where is  it ?!") == key("where is it")
    assert len({key("where is it"), key("where was it"), key("where is it", "system")}) == 3


def test_corrected_mistakes_are_no_new_wordings() -> None:
    """A "yes" that should have been "no" is a mistake, and so is an answer that is a correction elsewhere."""
    mistakes = [
        (f"{IMAGE}\nIs it red?", "yes", "No."),
        (f"{IMAGE}\nWhich animal?", "cow", "yak"),
        (f"{IMAGE}\nWhich animal?", "yak", "gnu"),
        (f"{IMAGE}\nWhich animal?", "gnu", "cow"),
    ]
    wordings = [(f"0.5 s {IMAGE}\nWhich color?", "red", "crimson"), (f"{IMAGE} which  COLOR", "blue", "navy")]
    reworded = Reworded.of([*mistakes, *wordings], ["yes", "no", "red", "blue", "green"])
    assert reworded == Reworded(frozenset({"which color"}), frozenset({"red", "blue"}))
    assert ("Which color?", "green") in reworded
    assert ("Name its color.", "Red") in reworded
    assert ("Is it red?", "yes") not in reworded
    assert ("Which animal?", "cow") not in reworded
    assert Reworded.read({"reworded": json.loads(json.dumps(reworded.to_json()))}) == reworded
    assert Reworded.read({}) == Reworded()
    turns = [("user", "Which color?"), ("assistant", "red"), ("user", "Is it red?"), ("assistant", "yes")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert reworded.left_out_of([0, 0, 1, 1, 0, 1, 1, 1], messages) == [0, 0, 0, 0, 0, 1, 1, 1]
