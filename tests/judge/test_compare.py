"""Complete comparisons of tiny models: identical, noisy and broken ones; cache and resume."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tests.judge.conftest import noise

from halfbyte.checkpoint.identity import digest_files
from halfbyte.errors import CheckpointError, ConfigError, ModelError
from halfbyte.evaluate.loading import open_subject
from halfbyte.judge import compare as module
from halfbyte.judge import model_cache
from halfbyte.judge.checks import Check
from halfbyte.judge.compare import compare
from halfbyte.judge.local_model import LocalModel
from halfbyte.judge.model_cache import subject_key
from halfbyte.judge.tasks import Item
from halfbyte.judge.verdict import Margins, Outcome
from halfbyte.quantize.rotate import rotate


@pytest.fixture
def run(base, items, documents, config, tmp_path):
    def call(candidate, base=base, **more):
        values = {"items": items, "documents": documents, "config": config, **more}
        return compare(base, candidate, cache=tmp_path / "cache", **values)

    return call


def outcomes(result):
    return {claim.name: claim.outcome for claim in result.verdict.claims}


def test_model_against_itself_has_no_flip_and_no_divergence(base, run):
    result = run(base)
    assert (result.overall.flips.harmful, result.overall.flips.beneficial) == (0, 0)
    assert result.overall.base_accuracy == 1.0
    assert result.text.kl_nats == 0
    assert result.text.top1_agreement == 1
    assert result.generation.identical == result.generation.num_items == 20
    assert max(linear.error for linear in result.layers.linears) == 0
    assert result.noise.identical_texts == result.noise.num_items == 10
    # 40 items without a flip do not show that fewer than 2 in 100 are lost.
    assert result.verdict.outcome is Outcome.INCONCLUSIVE
    accuracy = next(c for c in result.verdict.claims if c.name.startswith("Accuracy"))
    assert "items it is 80%" in accuracy.advice


def test_model_against_itself_passes_at_a_wide_margin(base, run, config):
    wide = dataclasses.replace(config, margins=Margins(accuracy=0.1))
    assert run(base, config=wide).verdict.outcome is Outcome.PASS


def test_small_weight_noise_gives_a_small_divergence(base, run, make_candidate):
    candidate = make_candidate(noise(1e-4))
    result = run(candidate)
    assert result.base_files == digest_files(base)
    assert result.candidate_files == digest_files(candidate)
    assert result.candidate_files["model.safetensors"] != result.base_files["model.safetensors"]
    assert 0 < result.text.kl_nats < 1e-4
    assert result.text.noise_kl_nats < result.text.kl_nats
    assert 0 < max(linear.error for linear in result.layers.linears) < 1e-2
    assert not result.layers.suspects


def test_layers_of_a_rotated_model_are_not_compared(base, run, config, tmp_path):
    rotate(base, tmp_path / "turned")
    result = run(
        tmp_path / "turned", items=[], config=dataclasses.replace(config, edge_cases=False)
    )
    assert result.text.kl_nats < 1e-6
    assert result.layers is None
    (note,) = result.notes
    assert note.startswith("Errors by layer were not measured: given the base's inputs")
    assert "a model in another basis" in note


def test_damaged_model_fails_and_its_flips_are_shown(run, make_candidate):
    result = run(make_candidate(noise(3.0)))
    assert result.verdict.outcome is Outcome.FAIL
    assert result.verdict.exit_code == 1
    found = outcomes(result)
    assert found["Accuracy falls by less than 2 points"] is Outcome.FAIL
    assert result.text.kl_nats > 0.5
    assert result.overall.flips.harmful > 10
    assert result.examples[0].kind == "harmful"
    assert result.examples[0].base_text != result.examples[0].candidate_text
    assert {s.name for s in result.slices} == {"kind choice", "kind written"}


def test_progress_names_every_stage_of_both_models_in_order(base, run, make_candidate, config):
    calls = []
    run(
        make_candidate(noise(0.01)),
        config=dataclasses.replace(config, edge_cases=True),
        progress=lambda stage, done, total: calls.append((stage, done, total)),
    )
    stages = ["loading", "tasks", "edge cases", "running text", "layers"]
    stages += ["predictions of edge cases"]
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == [
        *(f"base: {stage}" for stage in [*stages, "noise floor"]),
        *(f"candidate: {stage}" for stage in stages),
    ]
    assert all(0 <= done <= total for _, done, total in calls)
    for stage, total in (("base: tasks", 40), ("candidate: tasks", 40), ("base: noise floor", 10)):
        found = [call for call in calls if call[0] == stage]
        assert (found[0], found[-1]) == ((stage, 0, total), (stage, total, total))


def test_edge_cases_run_on_both_models(base, run, config):
    result = run(base, config=dataclasses.replace(config, edge_cases=True))
    assert not [o for o in result.edge_outcomes if o.new_finds]
    assert {kind.kl_nats for kind in result.edge_kinds} == {0}
    kinds = {kind.kind: kind.num_cases for kind in result.edge_kinds}
    assert len(kinds) >= 14
    assert sum(kinds.values()) == result.edges.flips.num_items >= 75
    # The tiny model knows no language and no JSON, and that is not the candidate's fault.
    assert result.edges.base_accuracy < 1


def test_nonfinite_logits_fail_whatever_the_margins(run, make_candidate, config):
    def spoil(model):
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")

    wide = dataclasses.replace(config, margins=Margins(accuracy=0.9, perplexity=0.9, slices=0.9))
    result = run(make_candidate(spoil), config=wide)
    assert outcomes(result)["All logits are finite"] is Outcome.FAIL
    assert result.text.candidate_finite is False


def test_nonfinite_logits_of_the_base_do_not_fail_the_candidate(base, run, make_candidate):
    def spoil(model):
        model.model.embed_tokens.weight[10] = float("nan")

    spoilt = make_candidate(spoil)
    result = run(base, base=spoilt)
    assert result.verdict.outcome is not Outcome.FAIL
    assert outcomes(result)["All logits are finite"] is Outcome.PASS
    (claim,) = [c for c in result.verdict.claims if c.name.startswith("Perplexity")]
    assert (claim.outcome, "The base's own logits" in claim.advice) == (Outcome.INCONCLUSIVE, True)
    assert outcomes(run(spoilt))["All logits are finite"] is Outcome.FAIL


def test_error_in_an_optional_step_becomes_a_note(base, run, monkeypatch):
    def fail(*_):
        raise ValueError("no such family")

    for name in ("save_base_layers", "measure_layers", "read_shapes"):
        monkeypatch.setattr(module, name, fail)
    result = run(base)
    assert result.text.kl_nats == 0
    assert result.costs[0].peak_memory_bytes
    assert result.notes == (
        "Errors by layer were not measured: no such family.",
        f"The memory of {base} was not planned: no such family.",
    )


def test_layer_with_wrong_scales_has_the_largest_gain_error(run, make_candidate, base):
    def stretch(model):
        model.model.layers[1].mlp.down_proj.weight *= 1.03

    result = run(make_candidate(stretch))
    worst = max(result.layers.linears, key=lambda linear: abs(linear.gain - 1))
    assert worst.name == "model.layers.1.mlp.down_proj"
    assert worst.gain == pytest.approx(1.03, abs=1e-4)


def test_base_is_run_once_for_two_candidates(run, base, make_candidate, monkeypatch):
    first = run(base)
    loaded = []

    def counting(folder, **more):
        loaded.append(folder.name)
        return open_subject(folder, **more)

    monkeypatch.setattr(module, "open_subject", counting)
    second = run(make_candidate(noise(0.01)))
    assert loaded == ["candidate"]
    assert first.costs[0].reused == 0
    assert (second.costs[0].reused, second.costs[0].tokens) == (40, 0)
    assert second.noise == first.noise


def test_killed_comparison_resumes(run, make_candidate, monkeypatch):
    candidate = make_candidate(noise(0.01))
    whole = run(candidate)
    written = LocalModel.write
    calls = []

    def failing(self, questions, **more):
        calls.append(len(questions))
        if len(calls) > 2:
            raise KeyboardInterrupt
        return written(self, questions, **more)

    monkeypatch.setattr(LocalModel, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        run(candidate)
    monkeypatch.setattr(LocalModel, "write", written)
    resumed = run(candidate, resume=True)
    assert resumed.costs[1].reused >= 8
    assert resumed.overall == whole.overall
    assert resumed.text.kl_nats == whole.text.kl_nats
    fresh = run(candidate)
    assert fresh.costs[1].reused == 0


def test_changed_weights_in_the_same_folder_do_not_reuse_the_cache(base, run, make_candidate):
    run(base)
    model_file = base / "model.safetensors"
    other = make_candidate(noise(0.5), "other")
    model_file.write_bytes((other / "model.safetensors").read_bytes())
    assert run(other).costs[0].reused == 0


def test_pickled_weights_are_rejected_even_with_cached_answers(base, run, make_candidate):
    run(base)
    for folder in (base, make_candidate(noise(0.5), "other")):
        weights = folder / "model.safetensors"
        torch.save({}, folder / "pytorch_model.bin")
        weights.unlink()
        with pytest.raises(CheckpointError, match=r"stored only as pickles \(pytorch_model.bin\)"):
            run(folder)


def test_cache_key_depends_on_everything_that_affects_answers(monkeypatch):
    cpu = torch.device("cpu")
    keys = [
        subject_key({"model.safetensors": "a"}, "auto", cpu),
        subject_key({"model.safetensors": "b"}, "auto", cpu),
        subject_key({"model.safetensors": "a"}, "bfloat16", cpu),
    ]
    monkeypatch.setenv("HALFBYTE_KERNEL", "torch_reference")
    keys.append(subject_key({"model.safetensors": "a"}, "auto", cpu))
    monkeypatch.setattr(model_cache, "installed_versions", lambda: {"transformers": "6.0"})
    keys.append(subject_key({"model.safetensors": "a"}, "auto", cpu))
    assert len(set(keys)) == 5


def test_invalid_items_and_windows_are_rejected_before_a_model_is_loaded(
    base, run, config, words, tmp_path
):
    def raising(text, line):
        return int(text) > 3

    check = Check(kind="python", value="raising")
    never = {"functions": {"raising": raising}, "documents": {}}
    with pytest.raises(ConfigError, match="item 'x': the check 'raising' raised ValueError"):
        run(base, items=[Item(name="x", prompt="w1", check=check)], **never)
    long = Item(name="long", prompt=words(100), choices=(" w1", " " + words(29)))
    with pytest.raises(
        ConfigError, match=r"'long' needs 100 tokens .* and 29 for its answer; .* 128 tog"
    ):
        run(base, items=[long])
    wide = dataclasses.replace(config, window=129)
    with pytest.raises(ConfigError, match="has 129 tokens; the models take 128"):
        run(base, items=[], documents={"one": [words(200)]}, config=wide)
    assert not list((tmp_path / "cache").rglob("answers.jsonl"))


def test_copies_of_one_question_count_as_one_document(base, run):
    item = Item(name="0", prompt="w1 w2", choices=(" w1", " w2"))
    copies = [dataclasses.replace(item, name=f"{n}") for n in range(400)]
    overall = run(base, items=copies, documents={}).overall
    assert (overall.flips.num_items, overall.flips.num_documents) == (400, 1)


def test_different_tokenizer_is_rejected(run, make_candidate, base):
    from tests.helpers.tiny_llama import build_tokenizer

    candidate = make_candidate(noise(0.01))
    build_tokenizer(shift=3).save_pretrained(candidate)
    with pytest.raises(ConfigError, match=r"encode item .* differently"):
        run(candidate)
    with pytest.raises(ConfigError, match=r"token \d+ is 'w\d+' in one and 'w\d+' in the other"):
        run(candidate, items=[])


def test_noise_floor_is_that_of_its_batch_size(base, run, config):
    assert run(base).noise.num_items == 10
    other = run(base, config=dataclasses.replace(config, batch_size=3, noise_items=5)).noise
    assert (other.num_items, other.batch_size) == (5, 4)


def test_cost_counts_tokens_of_text(base, run, config):
    result = run(base, items=[], config=dataclasses.replace(config, edge_cases=False))
    for cost in result.costs:
        assert cost.tokens >= result.text.num_tokens
        assert cost.peak_memory_bytes


def test_folder_without_a_model_is_named(run, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        run(tmp_path / "none")


def test_results_do_not_depend_on_the_batch_size(base, run, make_candidate, config):
    candidate = make_candidate(noise(0.2))
    results = [
        run(candidate, config=dataclasses.replace(config, batch_size=size)) for size in (1, 7)
    ]
    assert results[0].overall.flips == results[1].overall.flips
    assert results[0].generation == results[1].generation


def test_quantized_checkpoint_is_a_candidate(tmp_path):
    from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint
    from tests.helpers.tiny_llama import build_tokenizer

    from halfbyte.judge.setup import CompareConfig

    folder, base = tmp_path / "q", tmp_path / "b"
    model = write_checkpoint(folder, tiny_llama_config(), Recipe())
    model.save_pretrained(base)
    for one in (folder, base):
        build_tokenizer().save_pretrained(one)
    text = {"words": [" ".join(f"w{(i * k) % 60}" for i in range(40)) for k in range(1, 20)]}
    result = compare(
        base,
        folder,
        items=[],
        documents=text,
        config=CompareConfig(window=32, windows=None, edge_cases=False),
        cache=tmp_path / "cache",
    )
    # The base holds the very numbers that the codes stand for.
    assert result.text.kl_nats < 1e-9
    assert len(result.layers.linears) == 14
    assert max(abs(linear.gain - 1) for linear in result.layers.linears) < 1e-4
    assert result.verdict.outcome is Outcome.PASS
    assert json.dumps([c.name for c in result.verdict.claims])
    assert torch.isfinite(torch.tensor(result.text.candidate_perplexity))
