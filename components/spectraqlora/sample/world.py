"""Generated text with structure: a small world of people, stated many times in many ways."""

from __future__ import annotations

import random

SYLLABLES = [
    "ba",
    "be",
    "bi",
    "bo",
    "da",
    "de",
    "di",
    "do",
    "ka",
    "ke",
    "ki",
    "ko",
    "la",
    "le",
    "li",
    "lo",
    "ma",
    "me",
    "mi",
    "mo",
    "na",
    "ne",
    "ni",
    "no",
    "ra",
    "re",
    "ri",
    "ro",
    "sa",
    "se",
    "si",
    "so",
    "ta",
    "te",
    "ti",
    "to",
]
FACTS: dict[str, list[str]] = {
    "city": ["oslo", "rome", "lima", "cairo", "delhi", "paris", "tokyo", "quito", "sofia", "miami"],
    "job": ["baker", "pilot", "nurse", "farmer", "tailor", "miner", "judge", "painter", "singer", "guard"],
    "pet": ["cat", "dog", "horse", "parrot", "rabbit", "turtle", "goat", "snake", "hamster", "lizard"],
    "colour": ["red", "blue", "green", "black", "white", "yellow", "purple", "orange", "pink", "brown"],
}
STATEMENTS = {
    "city": [
        "{n} lives in {v} .",
        "the home of {n} is {v} .",
        "you can visit {n} in {v} .",
        "{n} is from {v} .",
    ],
    "job": [
        "{n} works as a {v} .",
        "the job of {n} is {v} .",
        "{n} earns money as a {v} .",
        "{n} is a {v} .",
    ],
    "pet": ["{n} has a {v} .", "the pet of {n} is a {v} .", "{n} feeds the {v} .", "{n} owns a {v} ."],
    "colour": ["{n} likes {v} .", "the colour of {n} is {v} .", "{n} paints it {v} .", "{n} wears {v} ."],
}
QUESTIONS = {
    "city": "Where does {n} live?",
    "job": "What is the work of {n}?",
    "pet": "Which animal does {n} own?",
    "colour": "Which colour does {n} like?",
}


def people(seed: int, count: int) -> dict[str, dict[str, str]]:
    """Names with one value of every attribute."""
    generator = random.Random(seed)
    names: set[str] = set()
    while len(names) < count:
        names.add("".join(generator.choice(SYLLABLES) for _ in range(3)))
    return {
        name: {kind: generator.choice(values) for kind, values in FACTS.items()} for name in sorted(names)
    }


def corpus(world: dict[str, dict[str, str]], seed: int, documents: int) -> list[str]:
    """Documents of three families: portraits of people, rolls of one attribute, and counting."""
    generator = random.Random(seed + 1)
    names = list(world)
    texts = []
    for _ in range(documents):
        family = generator.random()
        if family < 0.75:
            name = generator.choice(names)
            kinds = generator.sample(list(FACTS), len(FACTS))
            texts.append(
                " ".join(generator.choice(STATEMENTS[k]).format(n=name, v=world[name][k]) for k in kinds)
            )
        elif family < 0.9:
            kind = generator.choice(list(FACTS))
            lines = [f"{n} : {world[n][kind]}" for n in generator.sample(names, 6)]
            texts.append(f"list of {kind} , " + " ; ".join(lines) + " .")
        else:
            start, step = generator.randint(0, 20), generator.randint(1, 4)
            texts.append("count " + " ".join(str(start + step * i) for i in range(10)) + " .")
    return texts


def questions(world: dict[str, dict[str, str]], seed: int) -> list[dict[str, str]]:
    """The fine-tuning task: every fact of the world as question and answer, a form the base never saw."""
    rows = [
        {"question": QUESTIONS[kind].format(n=name), "answer": value}
        for name, facts in world.items()
        for kind, value in facts.items()
    ]
    random.Random(seed + 2).shuffle(rows)
    return rows
