"""In which language is a text? By its script, and within the Latin one by its smallest words.

Those words make up a third of any running text and hardly occur in other languages. A text that is
too short, or mixed, or code, is of no language: only what is clear may count against an answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from halfbyte.judge.edge_cases import script_of

FEWEST_WORDS = 12
LEAST_SHARE = 0.15
"""Of the words that must be a language's small ones."""
LEAD = 2.0
"""Times the next language's."""
LOOKED_AT = 800
"""Characters."""

SMALL_WORDS = {
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


def _by_word() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, words in SMALL_WORDS.items():
        for word in words.split():
            found.setdefault(word, []).append(name)
    return found


LANGUAGES: Mapping[str, list[str]] = _by_word()
"""Small word -> languages that have it."""


def language_of(text: str) -> str | None:
    """Tell a text's language.

    Args:
        text: An answer or a question; of a long one the beginning counts.

    Returns:
        A script in capitals, such as "CYRILLIC"; within the Latin one a language, such as
        "german"; None where it is not clear.
    """
    script = script_of(text[:LOOKED_AT])
    return _latin_language(text) if script == "LATIN" else script


def _latin_language(text: str) -> str | None:
    words = [word.lower() for word in WORD.findall(text[:LOOKED_AT])]
    if len(words) < FEWEST_WORDS:
        return None
    counts = Counter(name for word in words for name in LANGUAGES.get(word, ()))
    if not counts:
        return None
    (first, most), *others = counts.most_common(2)
    clear = most >= LEAST_SHARE * len(words) and (not others or most >= LEAD * others[0][1])
    return first if clear else None


def switches(asked: str, said: str) -> bool:
    """Tell whether an answer is in another language than its question, both being clear.

    Args:
        asked: The question.
        said: The answer.

    Returns:
        Whether it is. Between a Latin text of unclear language and another script it is, too.
    """
    scripts = script_of(asked[:LOOKED_AT]), script_of(said[:LOOKED_AT])
    if None in scripts:
        return False
    if scripts[0] != scripts[1] or scripts[0] != "LATIN":
        return scripts[0] != scripts[1]
    ours = _latin_language(asked)
    return ours is not None and _latin_language(said) not in (None, ours)
