"""Train a small second model for measure_quality.py, with weights that were never quantized.

    python bench/train_small_model.py FOLDER [--steps 1000] [--device cuda]

The sample model's weights come from a 4-bit file; this model's do not. It is a Llama of 16 million
parameters, trained on the sources of Python's standard library as shipped with the interpreter.
Every tenth file is held out, in FOLDER/held-out.txt; FOLDER/calibration.txt is from the others:

    python bench/measure_quality.py FOLDER --text FOLDER/calibration.txt \
        --test FOLDER/held-out.txt --name quality-second-model
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 8192
LENGTH = 512
SEQUENCES = 64
RATE = 1.5e-3
WARM_UP = 50
END = "<|end|>"
CALIBRATION_CHARACTERS = 2_000_000
HELD_OUT_CHARACTERS = 200_000


def main() -> None:
    """Collect the text, train tokenizer and model, write a Hugging Face folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    training, held_out = collect_text()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "calibration.txt").write_text("\n\n".join(training)[:CALIBRATION_CHARACTERS])
    (args.out / "held-out.txt").write_text("\n\n".join(held_out)[:HELD_OUT_CHARACTERS])
    tokenizer = train_tokenizer(training)
    tokenizer.save_pretrained(args.out)
    ids, held_out_ids = (encode(tokenizer, texts) for texts in (training, held_out))
    print(f"{len(training)} files, {len(ids)} tokens; {len(held_out)} files held out", flush=True)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        ),
        dtype=torch.float32,
    ).to(args.device)
    train(model, ids.to(args.device), held_out_ids.to(args.device), steps=args.steps)
    model.to("cpu", torch.bfloat16).save_pretrained(args.out, max_shard_size="15MB")


def collect_text() -> tuple[list[str], list[str]]:
    """Read the standard library's sources; a digest of a file's name decides if it is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or "dist-packages" in name or "/test" in f"/{name}":
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        is_held_out = hashlib.sha256(name.encode()).digest()[0] % 10 == 0
        (held_out if is_held_out else training).append(text)
    return training, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return the ids of all texts in one row, with an end token after each text."""
    rows = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([i for row in rows for i in (*row.ids, tokenizer.eos_token_id)])


def train(model: torch.nn.Module, ids: Tensor, held_out_ids: Tensor, *, steps: int) -> None:
    """Train on random windows, with warm-up and a cosine learning rate schedule."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    start = time.monotonic()
    for step in range(steps):
        turn = math.pi * max(0, step - WARM_UP) / steps
        rate = RATE * min(1.0, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(turn))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = compute_loss(model, draw(ids, SEQUENCES))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            with torch.no_grad():
                held_out_loss = float(
                    compute_loss(model, held_out_ids[: 32 * (LENGTH + 1)].view(32, -1))
                )
            seconds = time.monotonic() - start
            print(
                f"step {step}: {float(loss.detach()):.3f}, held out {held_out_loss:.3f}, "
                f"{seconds:.0f} s",
                flush=True,
            )


def draw(ids: Tensor, count: int) -> Tensor:
    """Sample windows that are one token longer than a sequence."""
    starts = torch.randint(0, len(ids) - LENGTH - 1, (count, 1), device=ids.device)
    return ids[starts + torch.arange(LENGTH + 1, device=ids.device)]


def compute_loss(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """Return the mean negative log-likelihood, computed in bf16."""
    with torch.autocast(windows.device.type, torch.bfloat16):
        logits = model(windows[:, :-1]).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


if __name__ == "__main__":
    main()
