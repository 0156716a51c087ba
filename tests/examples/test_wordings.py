"""Held-out wordings stay out of training, and typing errors change all but the slots of a wording."""

import random
import re
from itertools import product

from examples.stdlib_agent.phrasings import hand_written, talks, template_groups, templates, words
from examples.stdlib_agent.sums import Sums
from examples.stdlib_agent.wordings import HELD_OUT_WORDINGS, Wordings, quoted, typed

SECTIONS = {
    "lookup": "{x}",
    "bases": "{x}",
    "module": "{x}",
    "search": "{q}",
    "search_about": "{k}",
    "arithmetic": "{e}",
}


def expansions(template: str) -> set[str]:
    parts = re.split(r"\(([^()]*)\)", template)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return {" ".join("".join(chosen).split()) for chosen in product(*choices)}


def test_every_template_has_its_slot_and_no_other() -> None:
    for section, slot in SECTIONS.items():
        for template in templates(section):
            assert all(wording.count("{") == wording.count(slot) == 1 for wording in expansions(template)), template
    for talk in talks():
        assert not [template for template in talk.templates if "{" in template or "<" in template]
    for section in ("operations", "orders"):
        for expression, group in template_groups(section).items():
            slots = set(re.findall(r"{\w}", expression))
            assert all(set(re.findall(r"{\w}", template)) == slots for template in group), group


def test_wordings_held_out_are_a_fifth_and_never_trained_on() -> None:
    wordings = Wordings(templates("lookup"), 0)
    rng = random.Random(0)
    train = {wordings.pick(rng) for _ in range(3000)}
    held_out = {wordings.pick(rng, held_out=True) for _ in range(3000)}
    assert not train & held_out
    everything = set().union(*map(expansions, templates("lookup")))
    share = sum(map(wordings.is_held_out, everything)) / len(everything)
    assert abs(share - HELD_OUT_WORDINGS) < 0.03
    assert (train | held_out) <= everything


def test_without_a_seed_nothing_is_held_out() -> None:
    wordings = Wordings(["(a|b|c) {x}"], None)
    assert {wordings.pick(random.Random(n)) for n in range(50)} == {"a {x}", "b {x}", "c {x}"}


def test_another_seed_holds_out_other_wordings() -> None:
    everything = set().union(*map(expansions, templates("bases")))
    first, second = Wordings([], 0), Wordings([], 1)
    assert any(first.is_held_out(wording) != second.is_held_out(wording) for wording in everything)


def test_hand_written_wordings_are_apart_from_the_templates() -> None:
    for section in ("lookup", "bases", "module", "search", "arithmetic"):
        learned = set().union(*map(expansions, templates(section)))
        assert {text.lower().rstrip("?!.") for text in hand_written(section)} & learned == set()
    by_hand = {text for group in hand_written("small_talk").values() for text in group} | set(hand_written("off_topic"))
    learned = {wording for talk in talks() for template in talk.templates for wording in expansions(template)}
    assert {text.lower().rstrip("?!.") for text in by_hand} & {wording.lower() for wording in learned} == set()
    assert len(by_hand) > 90


def test_intents_do_not_share_wordings() -> None:
    seen: dict[str, str] = {}
    for talk in talks():
        for template in talk.templates:
            for wording in expansions(template):
                assert seen.setdefault(wording, talk.intent) == talk.intent, wording


def test_typing_keeps_what_fills_the_wording() -> None:
    rng = random.Random(0)
    name = "camelCase.snake_case{}"
    for number in range(3000):
        text = typed(rng, "what does {x} do", {"x": quoted(rng, name)}, disturbed=bool(number % 2))
        assert name in text
        assert "  " not in text


def test_typing_varies_and_slips_change_little() -> None:
    rng = random.Random(0)
    assert len({typed(rng, "what does {x} do", {"x": "y"}) for _ in range(500)}) > 100
    plain = "please explain what {x} does"
    slips = {typed(rng, plain, {"x": "y"}, disturbed=True).lower().strip("?!. ") for _ in range(500)}
    assert len(slips) > 150


def test_small_talk_is_not_turned_into_a_question_by_what_surrounds_it() -> None:
    asking = {word for word in words("prefixes") if "help" in word or "question" in word}
    assert asking
    assert not asking & set(words("chat_prefixes"))


def test_sums_keep_unseen_numbers_apart() -> None:
    sums = Sums(0.12, 0)
    rng = random.Random(0)

    def numbers(expression: str) -> tuple[str, ...]:
        return tuple(sorted(re.findall(r"[\d.]+", expression)))

    train = {numbers(sums.draw(rng).expression) for _ in range(4000)}
    held_out = {numbers(sums.draw(rng, held_out=True).expression) for _ in range(1000)}
    assert not train & held_out
    assert len(held_out) > 500


def test_sums_are_asked_for_with_their_numbers() -> None:
    rng = random.Random(1)
    sums = Sums(0.12, 0)
    drawn = [sums.draw(rng) for _ in range(2000)]
    for one in drawn:
        said = re.findall(r"\d+", (one.order or "{e}").format(**one.slots))
        assert set(said) <= set(re.findall(r"\d+", one.expression)), one
    assert {bool(one.order) for one in drawn} == {True, False}
    assert not any(sums.draw(rng, orders=False).order for _ in range(200))
