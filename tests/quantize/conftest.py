from __future__ import annotations

import pytest

from halfbyte.quant_config import QuantConfig
from halfbyte.quantize.report import (
    CalibrationReport,
    ModuleReport,
    QualityReport,
    QuantizationReport,
    SkippedModule,
)


def module_report(name: str, error: float | None = 0.01, **fields) -> ModuleReport:
    values = {
        "bits": 4,
        "group_size": 64,
        "symmetric": True,
        "num_tokens": 2048,
        "relative_error": error,
        "round_to_nearest_error": None if error is None else 2 * error,
        "damping_used": 0.01,
        "seconds": 0.5,
    }
    return ModuleReport(name=name, **(values | fields))


@pytest.fixture
def make_report():
    """Builds a report of a small run; keywords replace its fields."""

    def build(**fields) -> QuantizationReport:
        names = [f"model.layers.{b}.{k}" for b in range(3) for k in ("attn.q_proj", "mlp.down")]
        modules = [module_report(name, 0.001 * (i + 1)) for i, name in enumerate(names)]
        values = {
            "model": "owner/Tiny-1M",
            "output": "out",
            "config": QuantConfig().to_dict(),
            "calibration": CalibrationReport(
                source="built-in text", digest="ab" * 32, samples=4, length=512, tokens=2048
            ),
            "modules": tuple(modules),
            "skipped": (SkippedModule(name="lm_head", reason="not asked for"),),
            "quality": QualityReport(
                text="held-out text",
                text_digest="cd" * 32,
                windows=10,
                window=256,
                base_perplexity=20.1,
                quantized_perplexity=23.91,
                kl_nats_mean=0.1743,
                kl_standard_error=0.0042,
                top1_agreement=0.7801,
            ),
            "seconds": 130.2,
            "seconds_by_phase": {"blocks": 100.0},
            "peak_memory_bytes": 1_234_567_890,
            "checkpoint_bytes": 112_700_000,
            "bits_per_weight": 4.2813,
            "versions": {"halfbyte": "0.1.0", "torch": "2.13.0"},
            "machine": {"processor": "test", "cores": "2"},
        }
        return QuantizationReport(**(values | fields))

    return build


@pytest.fixture
def make_module():
    """Builds the report of one module."""
    return module_report
