from __future__ import annotations

import json

import pytest
from tests.helpers.stores import write_folder, write_verdict

from halfbyte.store.bom import make_bom
from halfbyte.store.store import Store


@pytest.fixture
def manifest(tmp_path):
    store = Store(tmp_path / "store")
    verdict = write_verdict(tmp_path / "v.json", "pass")
    folder = write_folder(tmp_path / "model")
    return store.add(folder, "m", verdict=verdict, base_folder=folder)


def test_bom_names_the_model_its_base_and_every_file(manifest):
    bom = make_bom(manifest, "pass")
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["version"] == manifest.version
    base = model["pedigree"]["ancestors"][0]
    assert base["name"] == "org/base"
    assert base["hashes"][0]["content"] == manifest.base.digest
    hashes = {c["name"]: c["hashes"][0]["content"] for c in bom["components"] if "hashes" in c}
    assert hashes == {path: record.sha256 for path, record in manifest.files.items()}
    assert {"name": "halfbyte:recipe.bits", "value": "4"} in model["properties"]
    assert make_bom(manifest, "pass") == bom


def test_bom_is_valid_by_the_schema(manifest):
    pytest.importorskip("cyclonedx")
    pytest.importorskip("jsonschema")
    from cyclonedx.exception import MissingOptionalDependencyException
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = json.dumps(make_bom(manifest, "pass"))
    try:
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    except MissingOptionalDependencyException as error:
        pytest.skip(str(error))
