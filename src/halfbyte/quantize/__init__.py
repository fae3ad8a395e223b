"""Text, weights -> checkpoint: calibration -> hessian -> grid -> gptq -> journal -> pipeline."""
