import json
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from halfbyte import sample_model as module
from halfbyte.cli.main import main
from halfbyte.sample_model import SampleModel, write_sample_model


@pytest.fixture
def written(monkeypatch):
    fake = create_autospec(write_sample_model)
    monkeypatch.setattr(module, "write_sample_model", fake)
    return fake


@pytest.mark.parametrize(
    ("created", "words"), [(True, "Wrote SmolLM2-135M-Instruct to sm"), (False, "nothing to do")]
)
def test_says_what_was_done(written, capsys, created, words):
    written.return_value = SampleModel(folder=Path("sm"), created=created)
    assert main(["sample-model", "sm", "--wheel", "w.whl", "--dtype", "float16"]) == 0
    assert words in capsys.readouterr().out
    assert written.call_args.args == (Path("sm"),)
    assert written.call_args.kwargs.items() >= {"wheel": Path("w.whl"), "dtype": "float16"}.items()


def test_json(written, capsys):
    written.return_value = SampleModel(folder=Path("sm"), created=True)
    assert main(["sample-model", "sm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": "sm", "created": True}


def test_foreign_folder_is_a_usage_error(tmp_path, capsys):
    (tmp_path / "x").write_text("")
    assert main(["sample-model", str(tmp_path)]) == 2
    assert "something else is there" in capsys.readouterr().err
