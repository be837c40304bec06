//! How compressed weights are stored: GPTQ and compressed-tensors.
