//! Compressors whose loss is repaired: pruning by magnitude, Wanda and SparseGPT, quantisation by rounding and GPTQ.
