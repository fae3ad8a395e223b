from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from halfbyte.errors import ConfigError, MissingExtraError
from halfbyte.judge.lm_eval_tasks import _generated_item, read_lm_eval

try:
    import lm_eval
except ImportError:
    lm_eval = None

needs_lm_eval = pytest.mark.skipif(
    lm_eval is None, reason="lm-eval is not installed (extra evaluate)"
)

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
{more}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def save(kind, more, lines):
        data, path = tmp_path / "data.jsonl", tmp_path / "mine.yaml"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        path.write_text(YAML.format(name="mine", data=data, kind=kind, more=more))
        return str(path)

    return save


@pytest.mark.skipif(lm_eval is not None, reason="lm-eval is installed")
def test_missing_lm_eval_gives_the_command_to_install_it():
    with pytest.raises(MissingExtraError, match=r'pip install "halfbyte\[evaluate\]"'):
        read_lm_eval(["arc_easy"], limit=None)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_choices_come_with_lm_evals_own_delimiter_and_answer(write):
    path = write(
        "multiple_choice",
        "doc_to_choice: choices\nmetric_list: [{metric: acc}]",
        [
            {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1},
            {"question": "The sky is", "choices": ["blue", "green"], "answer": 0},
        ],
    )
    first, second = read_lm_eval([path], limit=None)
    assert (first.prompt, first.choices, first.right_choice) == ("2 + 2 =", (" 3", " 4"), 1)
    assert (second.name, second.slices) == ("mine:1", {"task": "mine"})


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_generated_answers_have_their_stop_sequence_and_limit(write):
    more = (
        "generation_kwargs: {until: ['.'], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]"
    )
    path = write("generate_until", more, [{"question": "2 + 2 =", "answer": "4"}])
    (item,) = read_lm_eval([path], limit=None)
    assert (item.stop, item.max_new_tokens, item.check.value) == ((".",), 5, "4")


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"filter_list": [{"name": "n", "filter": [{"function": "regex"}]}]}, "regex"),
        ({"metric_list": [{"metric": "exact_match", "regexes_to_ignore": [","]}]}, "regexes_to"),
        ({"metric_list": [{"metric": "bleu"}]}, r"metrics are \['bleu'\]"),
    ],
)
def test_task_that_filters_answers_is_rejected(more, part):
    config = {"filter_list": None, "metric_list": [{"metric": "exact_match"}], **more}
    task = SimpleNamespace(config=SimpleNamespace(**config))
    instance = SimpleNamespace(args=("2 + 2 =", {}), doc={})
    with pytest.raises(ConfigError, match=f"the lm-eval task 'mine'.*{part}"):
        _generated_item("mine", task, 0, instance)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_unknown_task_is_rejected():
    with pytest.raises(ConfigError, match="cannot load the task 'no_such_task'"):
        read_lm_eval(["no_such_task"], limit=None)
