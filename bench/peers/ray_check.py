"""Parse a configuration of Ray Serve LLM with Ray's classes. Runs in Ray's environment."""

import json
import sys
from pathlib import Path

import yaml
from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema


def main(job_file: str) -> None:
    """Write the parsed configuration, with Ray's defaults, to a file."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    config = yaml.safe_load(Path(job["config"]).read_text(encoding="utf-8"))
    deployed = ServeDeploySchema.model_validate(config)
    # The schema silently accepts unknown fields.
    unknown = sorted(set(config) - set(ServeDeploySchema.model_fields))
    (application,) = deployed.applications
    unknown += sorted(set(config["applications"][0]) - set(type(application).model_fields))
    models = [LLMConfig.model_validate(model) for model in application.args["llm_configs"]]
    scaling = [
        AutoscalingConfig.model_validate(model.deployment_config["autoscaling_config"])
        for model in models
    ]
    for found, given in zip(scaling, application.args["llm_configs"], strict=True):
        asked = given["deployment_config"]["autoscaling_config"]
        unknown += sorted(set(asked) - set(type(found).model_fields))
    found = {
        "import_path": application.import_path,
        "port": deployed.http_options.port,
        "unknown": unknown,
        "models": [model.model_id for model in models],
        "engine_kwargs": [model.engine_kwargs for model in models],
        "replicas": [[one.min_replicas, one.max_replicas] for one in scaling],
    }
    Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
