"""Software bill of materials of a version, in CycloneDX 1.6: the model, its base and every file.

Source:
    CycloneDX 1.6 JSON schema: ``machine-learning-model`` components and ``modelCard``.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from halfbyte.store.manifest import Manifest
from halfbyte.version import __version__

SPEC_VERSION = "1.6"


def make_bom(manifest: Manifest, verdict: str | None) -> dict[str, Any]:
    """Describe a version for supply-chain tools.

    Args:
        manifest: The version.
        verdict: The result of its comparison with the base.

    Returns:
        The document, which is the same each time.
    """
    version = manifest.version
    model = {
        "type": "machine-learning-model",
        "bom-ref": f"model:{version}",
        "name": manifest.name,
        "version": version,
        "description": "A quantized language model.",
        "modelCard": _model_card(manifest, verdict),
        "properties": _properties({"recipe": manifest.recipe, "verdict": verdict or "none"}),
    }
    base = _base_component(manifest)
    if base is not None:
        model["pedigree"] = {"ancestors": [base], "notes": "quantized"}
    files = [
        {
            "type": "data" if name.endswith((".safetensors", ".gguf")) else "file",
            "bom-ref": f"file:{record.sha256}:{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": record.sha256}],
            "properties": _properties({"bytes": record.bytes}),
        }
        for name, record in sorted(manifest.files.items())
    ]
    tools = [
        {"type": "library", "bom-ref": f"tool:{name}", "name": name, "version": number}
        for name, number in sorted(manifest.tools.items())
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, version)}",
        "version": 1,
        "metadata": {
            "timestamp": manifest.created,
            "tools": {
                "components": [{"type": "application", "name": "halfbyte", "version": __version__}]
            },
            "component": model,
        },
        "components": [*files, *tools],
        "dependencies": [
            {"ref": model["bom-ref"], "dependsOn": [str(file["bom-ref"]) for file in files]}
        ],
    }


def _model_card(manifest: Manifest, verdict: str | None) -> dict[str, Any]:
    parameters: dict[str, Any] = {"task": "text-generation", "architectureFamily": "transformer"}
    if manifest.calibration is not None:
        parameters["datasets"] = [
            {"type": "dataset", "name": "calibration", "contents": {"properties": _properties(
                {"sha256": manifest.calibration})}}
        ]  # fmt: skip
    card: dict[str, Any] = {"modelParameters": parameters}
    if verdict is not None:
        metric = {"type": "comparison with the base model", "value": verdict}
        card["quantitativeAnalysis"] = {"performanceMetrics": [metric]}
    return card


def _base_component(manifest: Manifest) -> dict[str, Any] | None:
    base = manifest.base
    if base.id is None:
        return None
    component: dict[str, Any] = {"type": "machine-learning-model", "name": base.id}
    if base.revision is not None:
        component["version"] = base.revision
    if base.digest is not None:
        component["hashes"] = [{"alg": "SHA-256", "content": base.digest}]
    return component


def _properties(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """Flatten one level: recipe.bits = 4."""
    found = []
    for key, value in values.items():
        inner = value.items() if isinstance(value, Mapping) else [(None, value)]
        for name, item in inner:
            label = f"halfbyte:{key}" if name is None else f"halfbyte:{key}.{name}"
            found.append({"name": label, "value": str(item)})
    return found
