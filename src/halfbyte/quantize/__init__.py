"""Text and weights to a checkpoint: calibration -> hessian -> grid -> gptq -> journal -> pipeline."""
