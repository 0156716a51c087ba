"""What held-out questions about pictures are worth: answers without the picture, and by scikit-learn on pixels.

A model that is no better than the question alone has learned to guess; most yes-no questions can be guessed well.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from components.datasets.formats import Row
from components.evaluation.captions import CAPTION_WORDS, are_captions, caption_scores
from components.media.messages import IMAGE, without_marks
from components.media.pictures import Picture, decode_picture

MOST_EXAMPLES = 6_000
"""Training questions for each suite: a random sample of those with one of its answers."""
MOST_WORDS = 500
"""Of all questions, the most frequent ones."""
THUMBNAIL = 16
"""Pixels of each side of the pictures that are compared."""
LEVELS = 4
"""Of each channel, in a histogram of colors."""
MOST_FRAMES = 4
"""Pictures of one question that are compared: of more, these many evenly spaced ones."""
COMPONENTS = 48
"""Principal components of the pixels."""
VALIDATED_SHARE = 0.2
"""Of the training questions, those by which a kind of model is chosen."""
Figures = dict[str, float]
Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """A question about pictures, and its answer."""

    question: str
    """Without marks of pictures."""
    images: tuple[bytes, ...]
    answer: str


def picture_baselines(
    train_rows: Iterable[Row], test_rows: Iterable[Row], seed: int, most: int = MOST_EXAMPLES
) -> dict[str, Figures]:
    """Figures of baselines on each suite of test rows; rows are of kind `images`, and `most` bounds the time.

    Of answers: `question_only` is the share of right answers without the picture, the better of the most frequent
    answer to the question's text and logistic regression on its words; `pixels` is that of scikit-learn on words,
    colors and pixels. Of captions: `cider_d` and `bleu` (`components/evaluation/captions.py`) and `exact_match` of the
    caption of the nearest training picture. A suite is left out when no training question has one of its answers.
    """
    suites: dict[str, list[Example]] = defaultdict(list)
    for row in test_rows:
        suites[row["suite"]] += list(examples(row))[-1:]
    training = _relevant(train_rows, suites, seed, most)
    figures = {}
    for suite, tests in suites.items():
        if training[suite]:
            baseline = _caption_figures if _has_captions(tests) else _answer_figures
            figures[suite] = {name: round(value, 4) for name, value in baseline(training[suite], tests, seed).items()}
    return figures


def examples(row: Row) -> Iterator[Example]:
    """The questions of a conversation, each with all pictures before its answer."""
    images: list[bytes] = []
    question = ""
    for message in row["messages"]:
        content = message["content"] or ""
        if message["role"] == "user":
            images += row["images"][len(images) : len(images) + content.count(IMAGE)]
            question = " ".join(without_marks(content).split())
        elif message["role"] == "assistant":
            yield Example(question, tuple(images), content)


def _relevant(
    rows: Iterable[Row], suites: Mapping[str, Sequence[Example]], seed: int, most: int
) -> dict[str, list[Example]]:
    """For each suite a uniform sample of the training examples with one of its answers and as many pictures.

    All captions are relevant to a suite of captions.
    """
    rng = random.Random(seed)
    answers = {suite: {example.answer for example in tests} for suite, tests in suites.items()}
    counts = {suite: {_frames_compared(example) for example in tests} for suite, tests in suites.items()}
    captions = {suite for suite, tests in suites.items() if _has_captions(tests)}
    seen: Counter[str] = Counter()
    sample: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        for example in examples(row):
            is_caption = len(example.answer.split()) >= CAPTION_WORDS
            for suite in suites:
                is_relevant = is_caption if suite in captions else example.answer in answers[suite]
                if is_relevant and _frames_compared(example) in counts[suite]:
                    _add(sample[suite], example, seen[suite], rng, most)
                    seen[suite] += 1
    return defaultdict(list, sample)


def _add(sample: list[Example], example: Example, seen: int, rng: random.Random, most: int) -> None:
    """Reservoir sampling (Vitter 1985, algorithm R): bounded memory, each example equally likely."""
    if len(sample) < most:
        sample.append(example)
    elif (index := rng.randrange(seen + 1)) < most:
        sample[index] = example


def _has_captions(tests: Sequence[Example]) -> bool:
    return are_captions([example.answer for example in tests])


def _answer_figures(training: Sequence[Example], tests: Sequence[Example], seed: int) -> Figures:
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(binary=True, max_features=MOST_WORDS, token_pattern=r"\w+")
    train_words = words.fit_transform([example.question for example in training]).toarray().astype(np.float32)
    test_words = words.transform([example.question for example in tests]).toarray().astype(np.float32)
    answers = np.array([example.answer for example in training])
    right = np.array([example.answer for example in tests])
    blind = [_majority(training, tests)]
    if len(set(answers)) > 1:
        blind.append(_predict(_logistic(), train_words, answers, test_words))
    pixels = _seen(training, tests, train_words, test_words, answers, seed)
    return {
        "question_only": max(float(np.mean(predicted == right)) for predicted in blind),
        "pixels": float(np.mean(pixels == right)),
    }


def _majority(training: Sequence[Example], tests: Sequence[Example]) -> npt.NDArray[np.str_]:
    """The most frequent answer to each question's text; to an unseen text, the most frequent of all."""
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for example in training:
        by_question[example.question][example.answer] += 1
    most = Counter(example.answer for example in training).most_common(1)[0][0]
    known = {question: counts.most_common(1)[0][0] for question, counts in by_question.items()}
    return np.array([known.get(example.question, most) for example in tests])


def _seen(
    training: Sequence[Example],
    tests: Sequence[Example],
    train_words: Features,
    test_words: Features,
    answers: npt.NDArray[np.str_],
    seed: int,
) -> npt.NDArray[np.str_]:
    """Answers of trees or logistic regression, whichever is better on a part of the training questions."""
    from sklearn.decomposition import PCA
    from sklearn.model_selection import train_test_split

    if len(set(answers)) == 1:
        return np.repeat(answers[:1], len(tests))
    frames = max(map(_frames_compared, (*training, *tests)))
    features = [np.stack([_features(example.images, frames) for example in part]) for part in (training, tests)]
    colors = LEVELS**3 * frames
    pca = PCA(min(COMPONENTS, len(training)), random_state=seed, svd_solver="randomized")
    pca.fit(features[0][:, colors:])
    train, test = (
        np.concatenate([words, part[:, :colors], pca.transform(part[:, colors:])], axis=1)
        for words, part in zip((train_words, test_words), features, strict=True)
    )
    fitted, validated = train_test_split(np.arange(len(train)), test_size=VALIDATED_SHARE, random_state=seed)
    models = [_trees(seed), _logistic()]
    scores = [
        np.mean(_predict(model, train[fitted], answers[fitted], train[validated]) == answers[validated])
        for model in models
    ]
    return _predict(models[int(np.argmax(scores))], train, answers, test)


def _predict(model: Any, train: Features, answers: npt.NDArray[np.str_], test: Features) -> npt.NDArray[np.str_]:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # A baseline is bounded in time; stopping early costs it little.
        warnings.simplefilter("ignore", ConvergenceWarning)
        predicted: npt.NDArray[np.str_] = model.fit(train, answers).predict(test)
    return predicted


def _trees(seed: int) -> Any:
    from sklearn.ensemble import ExtraTreesClassifier

    return ExtraTreesClassifier(100, max_features=0.3, min_samples_leaf=2, random_state=seed)


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=50, tol=1e-2))


def _caption_figures(training: Sequence[Example], tests: Sequence[Example], seed: int) -> Figures:
    """Figures of the caption of the nearest training picture, by the sum of squared differences of thumbnails."""
    from sklearn.neighbors import NearestNeighbors

    train, test = (np.stack([_features(example.images, 1) for example in part]) for part in (training, tests))
    index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(train[:, LEVELS**3 :])
    nearest = index.kneighbors(test[:, LEVELS**3 :], return_distance=False)[:, 0]
    captions = [training[number].answer for number in nearest]
    scores = caption_scores(captions, [[example.answer] for example in tests])
    exact = sum(caption == example.answer for caption, example in zip(captions, tests, strict=True)) / len(tests)
    return {"cider_d": scores.cider_d, "bleu": scores.bleu, "exact_match": exact}


def _frames_compared(example: Example) -> int:
    return min(len(example.images), MOST_FRAMES)


def _features(images: Sequence[bytes], frames: int) -> Features:
    """A histogram of colors of each of `frames` pictures, then their thumbnails.

    Of more pictures, `frames` evenly spaced ones count; of fewer, the rest is zero.
    """
    count = min(len(images), frames)
    chosen = [images[round(number * (len(images) - 1) / max(1, count - 1))] for number in range(count)]
    pairs = [_picture_features(image) for image in chosen]
    histograms = np.zeros((frames, LEVELS**3), dtype=np.float32)
    thumbnails = np.zeros((frames, THUMBNAIL * THUMBNAIL * 3), dtype=np.float32)
    for number, (histogram, thumbnail) in enumerate(pairs):
        histograms[number], thumbnails[number] = histogram, thumbnail
    return np.concatenate([histograms.ravel(), thumbnails.ravel()])


@lru_cache(maxsize=20_000)
def _picture_features(image: bytes) -> tuple[Features, Features]:
    """The square roots of the shares of a picture's colors, (LEVELS³,), and its thumbnail, flattened, from 0 to 1."""
    picture: Picture = decode_picture(image, "picture")
    levels = picture.pixels.astype(int) * LEVELS // 256
    counts = np.bincount((levels @ (LEVELS * LEVELS, LEVELS, 1)).ravel(), minlength=LEVELS**3)
    small = Image.fromarray(picture.pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.sqrt(counts / counts.sum()).astype(np.float32), (np.asarray(small).ravel() / 255).astype(np.float32)
