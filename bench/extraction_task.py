"""A synthetic task that a small model cannot do without training: extract a record from a sentence.

Only the training data shows the order of the fields and the separators; an answer counts only if
it equals the record exactly. Held-out sentences combine the same parts in ways that training does
not contain.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FIRST = ["Maria", "Liam", "Aisha", "Kenji", "Elena", "Omar", "Sofia", "Noah", "Ingrid", "Mateo",
         "Priya", "Lucas", "Hana", "Tomas", "Nadia", "Victor"]  # fmt: skip
LAST = ["Lopez", "Carter", "Khan", "Tanaka", "Rossi", "Haddad", "Silva", "Bergman", "Novak",
        "Dubois", "Patel", "Weber", "Kim", "Moreau", "Ivanov", "Ortiz"]  # fmt: skip
CITIES = ["Lisbon", "Oslo", "Kyoto", "Boston", "Madrid", "Cairo", "Prague", "Lima", "Dublin",
          "Seoul", "Vienna", "Athens"]  # fmt: skip
ITEMS = ["lamps", "chairs", "books", "radios", "mugs", "bikes", "desks", "clocks", "tents",
         "rugs"]  # fmt: skip
SENTENCES = [
    "Order {order}: {first} {last} from {city} bought {count} {items} for {price} euros.",
    "{first} {last} paid {price} euros for {count} {items}; ship order {order} to {city}.",
    "To {city}: {count} {items}, {price} euros, customer {first} {last}, order {order}.",
    "Please send {count} {items} to {first} {last} in {city} (order {order}, {price} euros).",
]
PROMPT = "{sentence}\nRecord:"
RECORD = " #{order}|{last}, {first}|{city}|{count} x {items}|EUR {price}"


@dataclass(frozen=True, slots=True)
class Item:
    """One sentence and its record."""

    prompt: str
    record: str


def make_items(count: int, *, seed: int) -> list[Item]:
    """Make distinct items; the same seed gives the same items."""
    rng = random.Random(seed)
    items: dict[str, Item] = {}
    while len(items) < count:
        parts = {
            "order": rng.randint(1000, 9999),
            "first": rng.choice(FIRST),
            "last": rng.choice(LAST),
            "city": rng.choice(CITIES),
            "items": rng.choice(ITEMS),
            "count": rng.randint(2, 9),
            "price": rng.randint(10, 99),
        }
        sentence = rng.choice(SENTENCES).format(**parts)
        items[sentence] = Item(PROMPT.format(sentence=sentence), RECORD.format(**parts))
    return list(items.values())


def split_items(training: int, held_out: int) -> tuple[list[Item], list[Item]]:
    """Make the training items and the held-out items."""
    items = make_items(training + held_out, seed=1)
    return items[:training], items[training:]


def write_items(items: Sequence[Item], path: Path) -> None:
    """Write items in the format of ``halfbyte finetune``."""
    rows = [{"prompt": item.prompt, "completion": item.record} for item in items]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@torch.no_grad()
def measure_accuracy(model: Any, tokenizer: Any, items: Sequence[Item], batch: int = 50) -> float:
    """Return the share of items whose greedy answer equals the record exactly."""
    model.eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    max_new_tokens = max(len(tokenizer(item.record)["input_ids"]) for item in items) + 2
    num_correct = 0
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        encoded = tokenizer([item.prompt for item in part], return_tensors="pt", padding=True)
        encoded = encoded.to(model.device)
        ids = model.generate(
            **encoded,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(
            ids[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        num_correct += sum(
            text.strip() == item.record.strip() for text, item in zip(texts, part, strict=True)
        )
    return num_correct / len(items)
