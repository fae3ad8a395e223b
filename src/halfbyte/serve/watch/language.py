"""Detects a text's language: by its script, and for the Latin script by its stop words.

Stop words make up a third of any running text and are rare in other languages. For a text that is
short, mixed, or code, no language is detected: an answer must not fail the check by mistake.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from halfbyte.judge.edge_cases import script_of

MIN_WORDS = 12
MIN_SHARE = 0.15
"""Share of the words that must be stop words of the language."""
MIN_LEAD = 2.0
"""How many times more stop words the language must have than the next one."""
MAX_CHARACTERS = 800
"""Characters of a text that are examined."""

STOP_WORDS = {
    "english": "the of and to in is that it for was with as on be at by this are from or an not "
    "which have you they his but has were their will would can what there if all who been when "
    "its how do does we so your",
    "german": "der die und das den von zu mit sich des auf für ist im dem nicht ein eine als auch "
    "es an werden aus er hat dass sie nach wird bei einer um am sind noch wie einem über einen so "
    "zum war haben nur oder aber vor zur bis mehr durch ich wir",
    "french": "le la les de des et un une du en est que qui dans pour ce il au par sur plus ne se "
    "pas sont avec cette aux ou elle son ses mais nous vous comme tout leur je ils sans était être "
    "deux même fait d l c qu n s",
    "spanish": "el la los las de que y en un una del se por con no para su es al lo como más o "
    "pero sus le ha este si ya cuando muy sin sobre también me hasta hay donde quien desde todo "
    "nos esta son entre era fue",
    "italian": "il lo la i gli le di e che un una del della in per non si con da è al dei sono "
    "come più ma anche alla nel ha delle o se questo dal ai suo nella era essere su ci mi quando "
    "dalla loro l d c",
    "portuguese": "o a os as de que e do da em um uma para é com não no na por mais dos se foi ao "
    "das à sua ou ser quando muito há nos já está eu também só pelo pela até isso ela entre era "
    "depois sem mesmo aos ter seus",
    "dutch": "de het een en van in is dat op te zijn met voor niet aan er die om als ook dan maar "
    "bij naar uit wordt door over of nog hij heeft ze zij je was deze wel meer tot worden kan dit "
    "geen waar hun",
    "polish": "i w na z do nie się że jest to o jak za od po co tak ale przez dla jego był są czy "
    "być który tym już tylko ich może go przy także oraz będzie pod jej bo gdy",
    "swedish": "och i att det som en på är av för den med till har inte om ett han men var jag de "
    "kan så från vi när eller sig nu under också efter skulle blir ut där mot över man",
    "turkish": "bir ve bu da de için ile çok ne daha gibi olarak en kadar sonra olan ama o her "
    "ya değil diye var ki ancak bunu şey ise mi biz ben sen",
    "vietnamese": "và của là có không cho được các một trong với người những đã này khi ra để từ "
    "nhiều đến như cũng về vào sẽ tôi lại rất nhưng bạn thì theo còn",
    "indonesian": "yang dan di dengan untuk dari ini pada tidak itu dalam adalah akan oleh ada "
    "karena ke sebagai bisa juga saya atau telah lebih kami mereka sudah para kita dapat",
}
WORD = re.compile(r"[^\W\d_]+")


def _index_by_word() -> dict[str, list[str]]:
    languages: dict[str, list[str]] = {}
    for name, words in STOP_WORDS.items():
        for word in words.split():
            languages.setdefault(word, []).append(name)
    return languages


LANGUAGES: Mapping[str, list[str]] = _index_by_word()
"""The languages that have a stop word, by word."""


def detect_language(text: str) -> str | None:
    """Detect a text's language.

    Args:
        text: An answer or a question; only its beginning is examined.

    Returns:
        A script in capitals, such as "CYRILLIC"; for the Latin script a language, such as
        "german"; None if it is not clear.
    """
    text = text[:MAX_CHARACTERS]
    script = script_of(text)
    if script != "LATIN":
        return script
    words = [word.lower() for word in WORD.findall(text)]
    if len(words) < MIN_WORDS:
        return None
    counts = Counter(name for word in words for name in LANGUAGES.get(word, ()))
    if not counts:
        return None
    (language, count), *others = counts.most_common(2)
    is_clear = count >= MIN_SHARE * len(words) and (not others or count >= MIN_LEAD * others[0][1])
    return language if is_clear else None


def is_other_language(question: str, answer: str) -> bool:
    """Return whether an answer is in another language than its question.

    Args:
        question: The question.
        answer: The answer.

    Returns:
        True if the scripts differ, or if both are Latin and of different languages; False if that
        is not clear.
    """
    scripts = script_of(question[:MAX_CHARACTERS]), script_of(answer[:MAX_CHARACTERS])
    if None in scripts:
        return False
    if scripts[0] != scripts[1]:
        return True
    languages = {detect_language(question), detect_language(answer)}
    return None not in languages and len(languages) == 2
