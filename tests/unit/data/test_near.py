"""Rows that are nearly equal."""

import random

import numpy as np
import pytest
from spectraqlora.data.near import groups, signature

WORDS = ["".join(random.Random(seed).choices("abcdefghij", k=3 + seed % 6)) for seed in range(400)]


def sentence(seed: int, words: int = 60) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def changed(words: list[str], count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    places = draw.sample(range(len(words)), count)
    return [draw.choice(WORDS) if place in places else word for place, word in enumerate(words)]


def jaccard(one: str, other: str) -> float:
    parts = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (one, other)]
    return len(parts[0] & parts[1]) / len(parts[0] | parts[1])


def groups_of(*texts: str) -> list[int]:
    return groups(np.stack([signature(text) for text in texts])).tolist()


@pytest.mark.parametrize("count", [1, 5, 15])
def test_the_share_of_equal_minima_is_the_similarity(count: int) -> None:
    errors = []
    for seed in range(40):
        one, other = " ".join(sentence(seed)), " ".join(changed(sentence(seed), count, seed))
        errors.append(float((signature(one) == signature(other)).mean()) - jaccard(one, other))
    # The mean of 40, and each, within four standard errors of 128 draws.
    assert abs(np.mean(errors)) < 4 * 0.045 / 40**0.5 and max(map(abs, errors)) < 4 * 0.045


def test_texts_that_differ_in_a_word_are_one_group_and_others_are_not() -> None:
    texts = [sentence(seed) for seed in range(100)]
    near = [changed(text, 1, seed) for seed, text in enumerate(texts)]
    far = [changed(text, 30, seed) for seed, text in enumerate(texts)]
    found = groups_of(*(" ".join(text) for text in (*texts, *near, *far)))
    assert found[:200] == [*range(100)] * 2
    assert found[200:] == [*range(200, 300)]


def test_groups_are_linked_by_pairs_and_called_by_their_first_row() -> None:
    texts = [sentence(1)]
    for step in range(1, 6):
        texts.append(changed(texts[-1], 2, step))
    lines = [" ".join(text) for text in texts]
    assert jaccard(lines[0], lines[-1]) < 0.8
    assert groups_of("something else", *reversed(lines), "something else") == [0, *[1] * 6, 0]


@pytest.mark.parametrize("text", ["", "a", "abcd", "😀", "x" * 100_000, "\ud800"])
def test_every_text_has_a_signature_that_is_its_own(text: str) -> None:
    assert groups_of(text, "quite another text", text) == [0, 1, 0]
