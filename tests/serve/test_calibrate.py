from __future__ import annotations

import json
import random

import numpy as np
import pytest

from halfbyte.cli.main import main
from halfbyte.errors import ConfigError
from halfbyte.serve.calibrate import Judged, calibrate, read_judged
from halfbyte.serve.routing.confidence import measure_confidence, read_confidence
from halfbyte.serve.watch.observation import AttemptRecord


def judged(count, *, informative=True, seed=0, sign=1.0):
    """The base is right in 9 of 10 cases; the candidate is wrong more often where it is unsure."""
    rng = random.Random(seed)
    items = []
    for n in range(count):
        doubt = rng.random()
        wrong = 0.05 + 0.5 * (doubt if informative else 0.5) ** 2
        items.append(
            Judged(
                document=f"d{n // 3}",
                confidence=-sign * doubt,
                base_right=rng.random() < 0.9,
                candidate_right=rng.random() >= wrong,
            )
        )
    return items


def test_table_agrees_with_counting():
    items = judged(300)
    found = calibrate(items, share=0.1)
    assert found.chosen in found.choices
    for choice in found.choices:
        falls = [one.confidence < choice.threshold for one in items]
        right = [
            one.base_right if fall else one.candidate_right
            for one, fall in zip(items, falls, strict=True)
        ]
        alone = [one.candidate_right for one in items]
        assert choice.share == pytest.approx(np.mean(falls))
        assert choice.accuracy == pytest.approx(np.mean(right))
        assert choice.gain == pytest.approx(np.mean(right) - np.mean(alone))
        chance = np.mean(falls) * (np.mean([one.base_right for one in items]) - np.mean(alone))
        assert choice.over_chance == pytest.approx(choice.gain - chance)
        assert choice.gain_interval.low <= choice.gain <= choice.gain_interval.high
    assert found.chosen.share == pytest.approx(0.1)
    assert [c.share for c in found.choices] == sorted(c.share for c in found.choices)


def test_informative_confidence_is_distinguished_from_chance():
    assert calibrate(judged(1500), share=0.2).is_better_than_chance
    assert not calibrate(judged(1500, informative=False), share=0.2).is_better_than_chance


def test_entropy_falls_back_above_its_threshold():
    by_logprob = calibrate(judged(300), share=0.2)
    by_entropy = calibrate(judged(300, sign=-1.0), statistic="mean_entropy", share=0.2)
    assert by_entropy.chosen.threshold == -by_logprob.chosen.threshold
    assert by_entropy.chosen.gain == by_logprob.chosen.gain


@pytest.mark.parametrize(
    ("statistic", "first", "expected"),
    [
        ("mean_logprob", None, -2.0),
        ("mean_logprob", 2, -1.5),
        ("sum_logprob", None, -6.0),
        ("least_logprob", None, -3.0),
        ("least_logprob", 2, -2.0),
        ("mean_entropy", None, 0.5),
    ],
)
def test_statistics_are_computed_correctly(statistic, first, expected):
    found = measure_confidence(statistic, first, [-1.0, -2.0, -3.0], [0.5, 0.5])
    assert found == expected
    assert measure_confidence(statistic, first, [], []) is None


def test_ties_do_not_exceed_the_share():
    items = [
        Judged(document=str(n), confidence=-1.0 if n < 30 else -2.0, base_right=True,
               candidate_right=False)
        for n in range(40)
    ]  # fmt: skip
    assert calibrate(items, share=0.2).chosen.share == 0.0
    assert calibrate(items, share=0.25).chosen.share == 0.25


def test_intervals_have_their_nominal_coverage(monkeypatch):
    monkeypatch.setattr("halfbyte.serve.calibrate.SHARES", ())
    truth = calibrate(judged(60_000, seed=999), share=0.2).chosen.gain
    inside = 0
    for seed in range(60):
        interval = calibrate(judged(300, seed=seed), share=0.2).chosen.gain_interval
        inside += interval.low <= truth <= interval.high
    # 54 are due; three standard deviations either way are chance.
    assert 47 <= inside <= 60


def write_report(path, count=200, seed=0):
    rng = random.Random(seed)
    items = []
    for n in range(count):
        doubt = rng.random()
        items.append(
            {
                "name": f"i{n}",
                "document": "",
                "base_right": True,
                "candidate_right": rng.random() > doubt**2,
                "candidate_text": "x",
                "candidate_logprobs": [-doubt, -doubt - 0.1, -5.0] if n else [],
                "candidate_entropies": [doubt, doubt, 9.0] if n else [],
            }
        )
    path.write_text(json.dumps({"items": items}))
    return path


def test_command_writes_what_the_server_reads(tmp_path, capsys):
    report = write_report(tmp_path / "report.json")
    output = tmp_path / "confidence.json"
    code = main(
        ["serve", "calibrate", str(report), "-o", str(output), "--first-tokens", "2",
         "--share", "0.2"]
    )  # fmt: skip
    assert code == 0
    found = read_confidence(output)
    assert (found.statistic, found.first_tokens) == ("mean_logprob", 2)
    kept = json.loads(output.read_text())
    assert kept["items"] == 199
    assert kept["chosen"]["share"] == pytest.approx(0.2, abs=0.006)
    # The server doubts exactly the answers that the table counts.
    items = json.loads(report.read_text())["items"]
    doubted = sum(
        found.is_unsure(
            AttemptRecord(backend="", role="primary", started=0, logprobs=i["candidate_logprobs"])
        )
        for i in items
    )
    assert doubted == round(kept["chosen"]["share"] * 199)
    text = capsys.readouterr().out
    assert "199 answers" in text
    assert "falls back" in text


def test_unusable_report_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match="has 9 generated answers with known confidence; at least 16"
    ):
        read_judged(write_report(tmp_path / "few.json", 10), "mean_logprob", None)
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"Cannot read .*old\.json.*KeyError"):
        read_judged(tmp_path / "old.json", "mean_logprob", None)
    with pytest.raises(ConfigError, match="share is 1; it must be above 0 and below 1"):
        calibrate(judged(100), share=1.0)
    with pytest.raises(ConfigError, match=r"Cannot read a confidence threshold from .*none"):
        read_confidence(tmp_path / "none.json")
    (tmp_path / "other.json").write_text(
        '{"form": 9, "statistic": "mean_logprob", "threshold": -1, "first_tokens": null}'
    )
    with pytest.raises(ConfigError, match="it has format 9 and the statistic 'mean_logprob'"):
        read_confidence(tmp_path / "other.json")
