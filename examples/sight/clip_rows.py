"""Questions about short clips of moving digits and silhouettes, written as video files and read as a user's are.

Held out are pairs of an object and what it does: a digit that never moves to the left in training, two objects that
are never seen one after the other. Half of what moves, grows or is counted in training is a shape without a name, no
two alike: of named objects alone a model learns which of them does what, and that is wrong for each held-out pair.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from components.config.project import Collecting, Rows
from components.datasets.formats import Row
from components.media.clips import clip_content, decode_clip
from components.media.pictures import Pixels
from examples.sight.dialogue import Exchange, conversation, wording
from examples.sight.digit_rows import DIGITS
from examples.sight.drawing import SIDE, Mark, at_random_place, draw, extent, random_ground, random_shape, with_turned
from examples.sight.picture_files import ANIMALS, Grey, digits, silhouettes
from examples.sight.shapes import place
from examples.sight.video import write_clip

OBJECTS = (*DIGITS, *ANIMALS)
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Direction of a move, by its name: x to the right, y downwards."""
CHANGES = ("growing", "shrinking")
COUNTS = ("1", "2", "3", "4")
FRAMES = (4, 6)
"""Of a clip, least and most."""
MOST = 10_000
MOVING_SIZES, SHOWN_SIZES, COUNTED_SIZES = (22, 30), (30, 40), (16, 22)
"""Pixels of an object's longer side: moving, one after the other, several at once."""
SMALLEST, LARGEST = 14, 40
"""Pixels of the longer side of an object that grows or shrinks."""
SHORTEST_WAY = 24
"""Pixels that a moving object covers, at least."""
SHAPE = "shape"
"""The name of every shape without one."""
SHAPE_SHARE = 0.5
"""Of the training clips of an object, those of such a shape."""
STILL_SHARE = 0.5
"""Of the training clips of a count, those of one frame: it tells the count for a third of the tokens, and the tower,
which is pretrained on single pictures, sees several objects at once."""
Pair = tuple[str, str]
"""An object and a direction, change or count; or two objects, in the order of OBJECTS."""
Stamps = dict[str, list[Grey]]


@dataclass(frozen=True)
class Scene:
    """The frames of a clip, and its questions: the first is that of its task."""

    frames: list[Pixels]
    exchanges: list[Exchange]


def clip_rows(collecting: Collecting) -> Rows:
    """Half as many training conversations as the settings name, and held-out questions about held-out pairs."""
    settings, seed = collecting.settings, collecting.seed
    sources = (digits(settings.held_out_share, seed), silhouettes(settings.held_out_share, seed))
    train, test = ({**sources[0].train, **sources[1].train}, {**sources[0].test, **sources[1].test})
    held_out = held_out_pairs(settings.held_out_share, seed)
    rng = random.Random(f"{seed}:clips:test")
    suites = [(task, f"clips/{task}") for task in SCENES for _ in range(settings.questions)]
    suites += [(rng.choice(list(SCENES)), "clips/new_wordings") for _ in range(settings.questions)]
    tests = (_row(rng, task, rng.choice(held_out[task]), test, suite) for task, suite in suites)
    count = min(settings.conversations // 2, MOST)
    rng = random.Random(f"{seed}:clips")
    training = _training(rng, count, held_out, with_turned(train, rng))
    return Rows(training, tests, sources=[source.source for source in sources])


def held_out_pairs(share: float, seed: int) -> dict[str, list[Pair]]:
    """By task, the pairs that training never shows: about `share` of all, and of each object at most one."""
    rng = random.Random(f"{seed}:pairs")
    held_out = {}
    for task, values in VALUES.items():
        count = min(len(OBJECTS), max(1, round(share * len(OBJECTS) * len(values))))
        chosen = rng.sample(OBJECTS, count)
        held_out[task] = [(name, values[number % len(values)]) for number, name in enumerate(chosen)]
    pairs = list(combinations(OBJECTS, 2))
    held_out["order"] = rng.sample(pairs, max(1, round(share * len(pairs))))
    return held_out


def _training(rng: random.Random, count: int, held_out: dict[str, list[Pair]], stamps: Stamps) -> Iterator[Row]:
    pairs = {task: sorted(set(product(OBJECTS, values)) - {*held_out[task]}) for task, values in VALUES.items()}
    pairs["order"] = sorted(set(combinations(OBJECTS, 2)) - {*held_out["order"]})
    for _ in range(count):
        task = rng.choices(list(SCENES), WEIGHTS)[0]
        pair = rng.choice(pairs[task])
        if task in VALUES and rng.random() < SHAPE_SHARE:
            shape, pair = random_shape(rng), (SHAPE, pair[1])
            yield _row(rng, task, pair, {SHAPE: [shape]})
        else:
            yield _row(rng, task, pair, stamps)


def _row(rng: random.Random, task: str, pair: Pair, stamps: Stamps, suite: str | None = None) -> Row:
    """A clip of a pair and the question of its task, then, in training, the others about it in a random order."""
    scene = SCENES[task](rng, pair, stamps, suite is not None and suite.endswith("new_wordings"))
    is_still = suite is None and task == "count" and rng.random() < STILL_SHARE
    frames = decode_clip(write_clip(scene.frames[:1] if is_still else scene.frames), "clip")
    first, *others = scene.exchanges
    exchanges = [first] if suite else [first, *rng.sample(others, len(others))]
    return conversation([frame.picture.png() for frame in frames], exchanges, suite, clip_content(frames))


def _direction(rng: random.Random, pair: Pair, stamps: Stamps, is_new: bool) -> Scene:
    name, direction = pair
    stamp, size, (x, y) = rng.choice(stamps[name]), rng.randint(*MOVING_SIZES), STEPS[direction]
    width, height = extent(stamp, size)
    free = SIDE - (width if x else height)
    way = rng.randint(SHORTEST_WAY, free)
    start = rng.randint(0, free - way) + (way if x + y < 0 else 0)
    across = rng.randint(0, SIDE - (height if x else width))
    ways = [start + (x + y) * way * part for part in _parts(rng)]
    marks = [Mark(stamp, left, across, size) if x else Mark(stamp, across, left, size) for left in ways]
    question = wording(rng, "direction", is_new, object=named(name))
    ends = [
        (wording(rng, when), place(mark.left + width / 2, mark.top + height / 2))
        for when, mark in (("first_place", marks[0]), ("last_place", marks[-1]))
    ]
    return Scene(_drawn(rng, [[mark] for mark in marks]), [(question, direction), _what(rng, name), *ends])


def _size(rng: random.Random, pair: Pair, stamps: Stamps, is_new: bool) -> Scene:
    name, change = pair
    stamp, x, y = rng.choice(stamps[name]), rng.randint(22, SIDE - 22), rng.randint(22, SIDE - 22)
    sizes = [SMALLEST + (LARGEST - SMALLEST) * part for part in _parts(rng)]
    marks = []
    for size in sizes if change == "growing" else reversed(sizes):
        width, height = extent(stamp, size)
        marks.append([Mark(stamp, x - width / 2, y - height / 2, size)])
    question = wording(rng, "size", is_new, object=named(name))
    return Scene(_drawn(rng, marks), [(question, change), _what(rng, name)])


def _count(rng: random.Random, pair: Pair, stamps: Stamps, is_new: bool) -> Scene:
    """Copies of an object, each moving about within a quarter of the picture."""
    name, count = pair
    stamp, size, half = rng.choice(stamps[name]), rng.randint(*COUNTED_SIZES), SIDE // 2
    width, height = extent(stamp, size)
    quarters = rng.sample(list(product((0, half), repeat=2)), int(count))

    def within(x: int, y: int) -> Mark:
        return Mark(stamp, x + rng.randint(1, half - width - 1), y + rng.randint(1, half - height - 1), size)

    frames = [[within(*quarter) for quarter in quarters] for _ in _parts(rng)]
    return Scene(_drawn(rng, frames), [(wording(rng, "count", is_new), count), _what(rng, name)])


def _order(rng: random.Random, pair: Pair, stamps: Stamps, is_new: bool) -> Scene:
    """Two objects, one after the other."""
    first, second = rng.sample(pair, 2)
    count = len(_parts(rng))
    change = rng.randint(1, count - 1)
    first_mark, second_mark = (
        at_random_place(rng, rng.choice(stamps[name]), rng.randint(*SHOWN_SIZES)) for name in (first, second)
    )
    frames = [[first_mark]] * change + [[second_mark]] * (count - change)
    choices = rng.sample(pair, 2)
    question = wording(rng, "order", is_new, object=named(choices[0]), other=named(choices[1]))
    after = (wording(rng, "second_object"), named(second))
    return Scene(_drawn(rng, frames), [(question, named(first)), after])


def named(name: str) -> str:
    """An object in a question or an answer."""
    return f"the {name}"


def _what(rng: random.Random, name: str) -> Exchange:
    return wording(rng, "object"), named(name)


def _parts(rng: random.Random) -> list[float]:
    """How far a motion is at each frame, from 0 to 1."""
    count = rng.randint(*FRAMES)
    return [number / (count - 1) for number in range(count)]


def _drawn(rng: random.Random, frames: Sequence[Sequence[Mark]]) -> list[Pixels]:
    ground = random_ground(rng)
    return [draw(ground, marks) for marks in frames]


VALUES: dict[str, Sequence[str]] = {"direction": list(STEPS), "size": CHANGES, "count": COUNTS}
"""By task, what an object does; the other task is about two objects."""
WEIGHTS = (5, 1, 3, 3)
"""Of the tasks in training, in the order of SCENES: a direction, told by places in several frames, is the hardest of
them, growing and shrinking the easiest."""
SCENES: dict[str, Callable[[random.Random, Pair, Stamps, bool], Scene]] = {
    "direction": _direction,
    "size": _size,
    "count": _count,
    "order": _order,
}
