"""AutoGPTQ's two public classes, implemented with halfbyte.

::

    from_pretrained(folder, config) ──quantize(examples)──> temporary folder
                                    ──save_quantized(dir)─> moved there
    from_quantized(dir) ──> a loaded model; generate, calls and attributes go to it

A model is not loaded for quantization: halfbyte streams its weights block by block.

Source:
    AutoGPTQ 0.7 ``modeling/_base.py``, for names, order and defaults of the arguments.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from halfbyte.checkpoint.layout import CONFIG_FILES
from halfbyte.checkpoint.output_folder import share_weights
from halfbyte.errors import ConfigError
from halfbyte.integrations.auto_gptq_config import (
    IGNORED_FLAGS,
    BaseQuantizeConfig,
    find_device,
    rename_deprecated,
    warn_ignored,
)
from halfbyte.integrations.auto_gptq_files import (
    find_weights_file,
    move_out_of_scratch,
    prepare_target,
)
from halfbyte.quant_config import CalibrationConfig, ResourceConfig
from halfbyte.quantize.calibration_source import fit_to_rows
from halfbyte.quantize.source import HubOptions, find_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from halfbyte.quantize.report import QuantizationReport

__all__ = ["AutoGPTQForCausalLM", "BaseQuantizeConfig"]

COMMIT_MESSAGE = "Upload of a model quantized with halfbyte"


class AutoGPTQForCausalLM:
    """A quantized model, or one to be quantized; other attributes are those of the loaded model."""

    def __init__(
        self,
        source: str | Path,
        quantize_config: BaseQuantizeConfig,
        *,
        model: PreTrainedModel | None = None,
        quantized: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Store what is needed to load or quantize the model later.

        Args:
            source: A folder, or a name on the Hub.
            quantize_config: Quantization settings of the model.
            model: The model, if it is loaded already.
            quantized: Whether ``source`` is quantized.
            settings: Settings for finding and loading the model, as in Transformers.
        """
        self.source: str | Path = source
        self.quantize_config = quantize_config
        self.quantized = quantized
        self.report: QuantizationReport | None = None
        self._model = model
        self._hub, self._settings = HubOptions.split(settings or {})
        self._scratch: weakref.finalize[..., Any] | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        max_memory: dict[Any, Any] | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> Self:
        """Select a model to quantize, without loading its weights.

        Args:
            pretrained_model_name_or_path: A folder, or a name on the Hub.
            quantize_config: Quantization settings.
            max_memory: No effect: one block is in memory at a time.
            trust_remote_code: Run model code from the folder.
            **settings: Settings for downloading the files (such as ``revision``), and for loading
                the model if it is used before quantization.

        Returns:
            The model.
        """
        if max_memory is not None:
            warn_ignored("from_pretrained", ["max_memory"])
        settings = {**rename_deprecated(settings), "trust_remote_code": trust_remote_code}
        return cls(pretrained_model_name_or_path, quantize_config, settings=settings)

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: Any = None,
        max_memory: dict[Any, Any] | None = None,
        device: str | int | torch.device | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        trainable: bool = False,
        **flags: Any,
    ) -> Self:
        """Load a quantized model.

        Args:
            model_name_or_path: A folder, or a name on the Hub.
            device_map: As in Transformers.
            max_memory: As in Transformers; used with a device map.
            device: Device for the whole model; by default the first GPU, or the CPU.
            torch_dtype: Dtype to compute in; None: that of the model's config.
            trust_remote_code: Run model code from the folder.
            trainable: Put the model into training mode.
            **flags: ``model_basename`` is the name of the weights file without its suffix.
                AutoGPTQ's switches for its kernels have no effect; others are passed to
                :func:`halfbyte.load`.

        Returns:
            The loaded model.
        """
        from halfbyte.integrations.load import load

        basename = flags.pop("model_basename", None)
        ignored = [name for name in flags if name in IGNORED_FLAGS and flags[name] is not None]
        if ignored:
            warn_ignored("from_quantized", ignored)
        hub, settings = HubOptions.split(
            rename_deprecated({name: flags[name] for name in flags if name not in IGNORED_FLAGS})
        )
        folder = find_model(model_name_or_path, hub, with_code=trust_remote_code)
        placement: dict[str, Any] = {"device": None if device_map else find_device(device)}
        if device_map:
            placement = {"device_map": device_map, "max_memory": max_memory}
        model = load(
            folder,
            dtype=torch_dtype or "auto",
            weights_file=find_weights_file(folder, basename),
            trust_remote_code=trust_remote_code,
            **placement,
            **settings,
        )
        model.train(trainable)
        config = BaseQuantizeConfig.from_pretrained(folder)
        return cls(folder, config, model=model, quantized=True)

    def quantize(
        self,
        examples: Iterable[Any],
        batch_size: int = 1,
        use_triton: bool | None = None,
        use_cuda_fp16: bool | None = None,
        autotune_warmup_after_quantized: bool | None = None,
        cache_examples_on_gpu: bool | None = None,
    ) -> QuantizationReport:
        """Quantize the model into a temporary folder; ``save_quantized`` moves it.

        Args:
            examples: Outputs of the tokenizer, of one or many rows; lists of token ids; or texts.
            batch_size: Examples per forward pass, if their lengths allow it.
            use_triton: No effect.
            use_cuda_fp16: No effect.
            autotune_warmup_after_quantized: No effect.
            cache_examples_on_gpu: No effect.

        Returns:
            The report of the run.

        Raises:
            ConfigError: The model is already quantized.
        """
        from halfbyte.quantize.pipeline import quantize

        if self.quantized:
            raise ConfigError(
                f"Cannot quantize {self.source}: it is already quantized. "
                "Load the base model with from_pretrained."
            )
        given = {
            "use_triton": use_triton,
            "use_cuda_fp16": use_cuda_fp16,
            "autotune_warmup_after_quantized": autotune_warmup_after_quantized,
            "cache_examples_on_gpu": cache_examples_on_gpu,
        }
        ignored = [name for name, value in given.items() if value is not None]
        if ignored:
            warn_ignored("quantize", ignored)
        calibration = CalibrationConfig(batch_size=None if batch_size == 1 else batch_size)
        items, calibration = fit_to_rows(examples, calibration)
        scratch = tempfile.mkdtemp(prefix="halfbyte-")
        # The folder is deleted with this object, or when its files are moved by save_quantized.
        self._scratch = weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        output = Path(scratch) / "model"
        self.report = quantize(
            self.source,
            output,
            config=self.quantize_config.to_quant_config(),
            calibration=calibration,
            resources=ResourceConfig(device="cuda" if torch.cuda.is_available() else "cpu"),
            text=items,
            hub=self._hub,
        )
        self.source, self.quantized, self._model = output, True, None
        self._hub = HubOptions()
        return self.report

    def save_quantized(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Write the quantized model into a folder, in the standard GPTQ format.

        Args:
            save_dir: The folder; created if it does not exist.
            use_safetensors: No effect: safetensors are always used.
            safetensors_metadata: No effect.
            **options: No effect.

        Raises:
            ConfigError: The model is not quantized yet, or the folder holds an unquantized one.
        """
        if not self.quantized:
            raise ConfigError(
                f"Cannot save {self.source}: it is not quantized yet. Call quantize(...) first."
            )
        ignored = [*options, *(["safetensors_metadata"] if safetensors_metadata else [])]
        if not use_safetensors:
            ignored.append("use_safetensors=False")
        if ignored:
            warn_ignored("save_quantized", ignored)
        target = Path(save_dir)
        if self._scratch is not None:
            move_out_of_scratch(Path(self.source), target, self._scratch)
            self._scratch, self.source = None, target
            return
        prepare_target(target)
        if self._model is None:
            if not target.samefile(self.source):
                shutil.copytree(self.source, target, dirs_exist_ok=True)
        else:
            self._model.save_pretrained(target)
            share_weights(target)
            labels = self._model.config.quantization_config.to_dict()
            text = json.dumps(labels, indent=2) + "\n"
            (target / CONFIG_FILES[0]).write_text(text, encoding="utf-8")

    save_pretrained = save_quantized

    def push_to_hub(
        self,
        repo_id: str,
        save_dir: str | Path | None = None,
        use_safetensors: bool = True,
        safetensors_metadata: dict[str, str] | None = None,
        commit_message: str = COMMIT_MESSAGE,
        use_auth_token: str | bool | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str:
        """Save the quantized model and upload it to the Hugging Face Hub.

        Args:
            repo_id: ``user/name``; the repository is created if it does not exist.
            save_dir: Folder to save to; None: a temporary folder.
            use_safetensors: As in save_quantized.
            safetensors_metadata: As in save_quantized.
            commit_message: Commit message of the upload.
            use_auth_token: Deprecated name of ``token``.
            private: Whether a new repository is private.
            token: Token for the Hub; None: the one of the current login.
            create_pr: Open a pull request instead of committing.
            **options: As in save_quantized.

        Returns:
            The URL of the commit or the pull request.
        """
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory(prefix="halfbyte-") as scratch:
            folder = Path(save_dir or scratch)
            if save_dir is not None or self._scratch is None:
                self.save_quantized(folder, use_safetensors, safetensors_metadata, **options)
            else:
                # Saving would move the only copy into a folder that is about to be deleted.
                folder = Path(self.source)
            api = HfApi(token=use_auth_token if token is None else token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        return str(commit)

    @property
    def model(self) -> PreTrainedModel:
        """The Transformers model, loaded on first use."""
        if self._model is None:
            self._model = self._load()
        return self._model

    @property
    def config(self) -> PretrainedConfig:
        """The model's config, read without loading the model."""
        if self._model is not None:
            return self._model.config
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._folder(), trust_remote_code=self._trust_remote_code)

    @property
    def hf_device_map(self) -> dict[str, Any] | None:
        """Devices by module; None if the whole model is on one."""
        return getattr(self.model, "hf_device_map", None)

    @property
    def device(self) -> torch.device:
        """The device for the model's inputs."""
        device: torch.device = self.model.device
        return device

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``generate`` of the Transformers model, without gradients."""
        model = self.model  # loaded outside inference mode: such tensors cannot be trained on
        with torch.inference_mode():
            return model.generate(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the Transformers model."""
        return self.model(*args, **kwargs)

    __call__ = forward

    def warmup_triton(self, enabled: bool = True) -> None:
        """Do nothing: kernels are compiled when they first run."""

    def to(self, device: str | int | torch.device) -> Self:
        """Move the model to a device.

        Args:
            device: The device.

        Returns:
            Itself.
        """
        self.model.to(device)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"AutoGPTQForCausalLM has no attribute '{name}'")
        return getattr(self.model, name)

    @property
    def _trust_remote_code(self) -> bool:
        return bool(self._settings.get("trust_remote_code"))

    def _folder(self) -> Path:
        return find_model(self.source, self._hub, with_code=self._trust_remote_code)

    def _load(self) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        from halfbyte.integrations.load import load

        if self.quantized:
            device = None if "device_map" in self._settings else "auto"
            return load(self.source, device=device, **self._settings)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self._folder(), **self._settings
        )
        return model
