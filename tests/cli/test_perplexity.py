import json
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from halfbyte.cli.main import main
from halfbyte.evaluate import perplexity as module
from halfbyte.evaluate.perplexity import PerplexityResult, perplexity

RESULT = PerplexityResult(
    perplexity=20.1004,
    standard_error=2.3538,
    nll_nats=3.00074,
    nll_standard_error=0.1171,
    num_tokens=20470,
    num_windows=10,
    window=2048,
    dtype="float32",
    note="Few windows.",
)


@pytest.fixture
def measured(monkeypatch):
    fake = create_autospec(perplexity, return_value=RESULT)
    monkeypatch.setattr(module, "perplexity", fake)
    return fake


def test_table_has_the_number_its_error_and_the_windows(measured, capsys):
    assert main(["perplexity", "some/model", "--windows", "10"]) == 0
    out = capsys.readouterr().out
    for part in ("some/model", "20.100", "± 2.354", "3.0007", "10 windows of 2048", "20470"):
        assert part in out
    assert "Note: Few windows." in out
    (model,), keywords = measured.call_args
    assert model == Path("some/model")
    assert keywords["windows"] == 10


def test_json_has_every_field(measured, capsys):
    assert main(["perplexity", "some/model", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == {"model": "some/model", "text": None, **RESULT.to_dict()}


def test_missing_folder_fails_without_a_traceback(tmp_path, capsys):
    assert main(["perplexity", str(tmp_path / "no")]) == 1
    assert "no such folder" in capsys.readouterr().err
